"""The launch configurations that come with the package, and the commands that use them."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.commands.config.config_args import load_config_from_file

from .engines import OFFLOADED, name_engine, require_packages


SHIPPED = Path(__file__).parent / "accelerate_configs"
ACCELERATES_STAGE = 2  # of a DeepSpeed configuration that does not name one


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
    config = load_config_from_file(str(launch_config(name)))
    return _engine(config), config.num_processes


def launch_command(name: str | None, arguments: Sequence[str]) -> list[str]:
    """The command line that runs `beft ARGUMENTS` under a launch configuration, or in one process for `None`.

    Raises:
        ImportError, ValueError: where the configuration's engine cannot run here.
    """
    module = ["-m", "beft_trl.cli", *arguments]
    if name is None:
        return [sys.executable, *module]
    file = str(launch_config(name))
    config = load_config_from_file(file)
    require_packages(_engine(config))  # the launcher's own error is a traceback
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file]
    if config.num_machines == 1:
        launcher += ["--main_process_port", "0"]  # any free one
    return [*launcher, *module]


def _engine(config: Any) -> str:
    zero = _zero_optimization(config.deepspeed_config) if config.distributed_type == "DEEPSPEED" else None
    return name_engine(config.num_processes, zero, config.distributed_type == "FSDP")


def _zero_optimization(settings: dict[str, Any]) -> dict[str, Any]:
    if "deepspeed_config_file" in settings:
        text = Path(settings["deepspeed_config_file"]).read_text(encoding="utf-8")
        return json.loads(text).get("zero_optimization", {})
    offload = {f"offload_{what}": {"device": settings.get(f"offload_{what}_device")} for what in OFFLOADED}
    return {"stage": settings.get("zero_stage", ACCELERATES_STAGE), **offload}
