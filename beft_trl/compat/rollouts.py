"""What TRL keeps to itself of how it sends weights to vLLM."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


def send_only_biases(generation: Any, biases: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
    """Has TRL send vLLM the trained biases only, and not the whole model with the adapter merged into it.

    TRL (1.16) takes what it sends from `VLLMGeneration._iter_named_params`. There it merges the adapter into the
    model and takes it out again, which PEFT (0.21) refuses for layers without a bias (huggingface/peft#3227), and
    which leaves a rounding error in a 16-bit bias each time. An engine that sleeps loses its weights, and is sent all
    of them. This goes when TRL asks the model what to send.

    Args:
        generation (`VLLMGeneration`): of a trainer whose model is a `PeftModel`.
        biases (`Callable`): gives the trained biases by the name of the parameter in the base model. A collective.
    """

    def named_parameters() -> Iterator[tuple[str, Tensor]]:
        sent = dict(biases())
        if generation.enable_sleep_mode:
            for name, parameter in generation.model.get_base_model().named_parameters():
                name = name.replace(".base_layer.", ".")
                if ".beft_bias." not in name and name not in sent:
                    with generation._dist.gather_params([parameter]):
                        yield name, parameter.data
        yield from sent.items()

    generation._iter_named_params = named_parameters
