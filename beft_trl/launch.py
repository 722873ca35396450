"""The launch configurations that come with the package, and the commands that use them."""

import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate.commands.config.config_args import load_config_from_file

from .engines import ENGINES


SHIPPED = Path(__file__).parent / "accelerate_configs"


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
    """The engine of a launch configuration, a name in `engines.ENGINES`, and its number of processes."""
    config = load_config_from_file(str(launch_config(name)))
    if config.distributed_type == "DEEPSPEED":
        settings = config.deepspeed_config
        stage = f"zero{settings['zero_stage']}"
        offload = any(
            settings.get(f"offload_{what}_device", "none") not in (None, "none") for what in ("optimizer", "param")
        )
        engine = f"{stage}_offload" if offload and f"{stage}_offload" in ENGINES else stage
    else:
        engine = "ddp" if config.num_processes > 1 else "single"
    if engine not in ENGINES:
        raise ValueError(f"{launch_config(name)} starts {engine}, which is none of {', '.join(ENGINES)}.")
    return engine, config.num_processes


def launch_command(name: str | None, arguments: Sequence[str]) -> list[str]:
    """The command line that runs `beft ARGUMENTS` under a launch configuration, or in one process for `None`."""
    module = ["-m", "beft_trl.cli", *arguments]
    if name is None:
        return [sys.executable, *module]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch_config(name))]
    if load_config_from_file(str(launch_config(name))).num_machines == 1:
        launcher += ["--main_process_port", "0"]  # any free one
    return [*launcher, *module]
