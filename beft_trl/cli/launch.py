"""The launch configurations that come with the package, and the commands that use them."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, PrecisionType

from ..engines import OFFLOADED, name_engine, require_packages


SHIPPED = Path(__file__).parent / "accelerate_configs"
ACCELERATES_STAGE = 2  # of a DeepSpeed configuration that does not name one
LAUNCHED = ("NO", "DEEPSPEED", "FSDP")  # the last is refused by `engines`, with what does the same
CHOICES = {
    "compute_environment": ["LOCAL_MACHINE"],
    "distributed_type": [
        kind for kind in DistributedType.__members__ if kind in LAUNCHED or kind.startswith("MULTI_")
    ],
    "mixed_precision": PrecisionType.list(),
}


def launch_config(name: str) -> Path:
    """The file of a launch configuration.

    Args:
        name: of a shipped one, such as `"zero2"`, or the path of a file of your own.

    Raises:
        ValueError: for neither.
    """
    if Path(name).is_file():
        return Path(name)
    if not (SHIPPED / f"{name}.yaml").is_file():
        known = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.yaml")))
        raise ValueError(f"There is no launch configuration {name!r}. Use one of {known}, or the path of a file.")
    return SHIPPED / f"{name}.yaml"


def launched_engine(name: str) -> tuple[str, int]:
    """The engine of a launch configuration, a name in `engines.ENGINES`, and its number of processes.

    Raises:
        OSError, ValueError: for a file that cannot be read, or an engine that is not among them.
    """
    config = _read(launch_config(name))
    return _engine(config), config.num_processes


def launch_command(name: str | None, arguments: Sequence[str]) -> list[str]:
    """The command line that runs `beft ARGUMENTS` under a launch configuration, or in one process for `None`.

    Raises:
        ImportError, ValueError: if the file is none, or its engine cannot run here.
    """
    module = ["-m", "beft_trl.cli", *arguments]
    if name is None:
        return [sys.executable, *module]
    file = launch_config(name)
    config = _read(file)
    require_packages(_engine(config))  # the launcher's own error is a traceback
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    if config.num_machines == 1:
        launcher += ["--main_process_port", "0"]  # any free one
    return [*launcher, *module]


def _read(file: Path) -> Any:
    """A launch configuration, of which `accelerate launch` itself checks little.

    Raises:
        ValueError: for a file that is none, or a value with which no run starts.
    """
    try:
        config = load_config_from_file(str(file))
    # accelerate does not ask whether the file holds a mapping.
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{file} is no launch configuration of accelerate's ({type(error).__name__}: {error}). Write one with "
            "accelerate config, or use a shipped one, such as --launch ddp."
        ) from error
    for name, known in CHOICES.items():
        given = getattr(config, name)
        # YAML reads NO without quotes as false, and the launcher takes that for it.
        if getattr(given, "value", given) not in (*known, None, False):
            raise ValueError(f"{file}: {name} is {given!r}, and must be one of {', '.join(known)}.")
    for name in ("num_processes", "num_machines"):
        number = getattr(config, name)
        if type(number) is not int or number < 1:
            raise ValueError(f"{file}: {name} is {number!r}, and must be a whole number of at least 1.")
    if config.distributed_type == "DEEPSPEED":
        _check_deepspeed(config.deepspeed_config, file)
    return config


def _check_deepspeed(settings: Any, file: Path) -> None:
    if not isinstance(settings, dict) or not settings:
        raise ValueError(
            f"{file}: deepspeed_config is {settings!r}, and must have zero_stage or deepspeed_config_file, as "
            "--launch zero2 has."
        )
    try:
        stage = _zero_optimization(settings).get("stage", ACCELERATES_STAGE)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{file}: deepspeed_config_file={settings.get('deepspeed_config_file')!r} holds no configuration of "
            f"DeepSpeed's ({type(error).__name__}: {error})."
        ) from error
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ValueError(f"{file}: the stage of ZeRO is {stage!r}, and must be 1, 2 or 3.")


def _engine(config: Any) -> str:
    zero = _zero_optimization(config.deepspeed_config) if config.distributed_type == "DEEPSPEED" else None
    return name_engine(config.num_processes, zero, config.distributed_type == "FSDP")


def _zero_optimization(settings: dict[str, Any]) -> dict[str, Any]:
    if "deepspeed_config_file" in settings:
        text = Path(settings["deepspeed_config_file"]).read_text(encoding="utf-8")
        return json.loads(text).get("zero_optimization", {})
    offload = {f"offload_{what}": {"device": settings.get(f"offload_{what}_device")} for what in OFFLOADED}
    return {"stage": settings.get("zero_stage", ACCELERATES_STAGE), **offload}
