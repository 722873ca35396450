"""What reward functions return: one number, or `None`, for each completion."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch


def checked_rewards(functions: Any) -> Any:
    """The reward functions, which say what is wrong with what they return.

    TRL (1.16) checks how many rewards there are, and no more. An infinite one would make the advantages of its group
    zero in GRPO, and 3e38 in RLOO.

    Args:
        functions: `reward_funcs` of a trainer, one or a list. Models, names and other objects that can be called are
            passed on, and so is `None`, of which TRL says what it asks for.

    Raises:
        TypeError: for what is neither.
    """
    for each in functions if isinstance(functions, list) else [functions]:
        if not (each is None and functions is None or isinstance(each, str) or callable(each)):
            raise TypeError(
                f"reward_funcs has {each!r:.80}, which is {type(each).__name__} and gives no reward. Give a function, "
                "a reward model or the name of one, or a list of them."
            )
    return [_checked(each) for each in functions] if isinstance(functions, list) else _checked(functions)


def _checked(function: Any) -> Any:
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        return function
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def reward_later(*args: Any, **kwargs: Any) -> Any:
            return _check(function, await function(*args, **kwargs))

        return reward_later

    @functools.wraps(function)
    def reward(*args: Any, **kwargs: Any) -> Any:
        return _check(function, function(*args, **kwargs))

    return reward


def _check(function: Callable, values: Any) -> Any:
    name = function.__name__
    needed = "It must return a list with one finite number, or None, for each completion."
    try:
        values = list(values)
        numbers = torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"The reward function {name} returned {values!r:.80}. {needed}") from error
    if numbers.dim() != 1:
        raise TypeError(f"The reward function {name} returned {values!r:.80}. {needed}")
    if numbers.isinf().any():
        found = int(numbers.isinf().nonzero()[0])
        raise ValueError(f"The reward function {name} returned {values[found]} for completion {found + 1}. {needed}")
    return values
