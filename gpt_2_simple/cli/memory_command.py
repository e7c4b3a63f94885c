"""The command `memory`: plans of training's memory, and of generating's."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Annotated, Any, ClassVar

from ..common.device_memory import MEGABYTE, USABLE, usable_bytes
from ..common.folders import model_folder, read_hparams
from ..common.hparams import HParams
from ..common.published import published_hparams
from ..common.report import complain, say
from ..common.settings import Setting, fields_of
from ..generation.settings import GenerationMemorySettings
from ..training.settings import MemoryPlanSettings
from .json_output import OUTPUT, JsonSettings, print_json
from .parser import PROGRAM, Command, Options
from .plain_commands import load_module, take_options


@dataclasses.dataclass(frozen=True)
class CardSettings(JsonSettings):
    """What `memory` asks beside memory_plan()'s settings."""

    GROUPS: ClassVar = (*MemoryPlanSettings.GROUPS, OUTPUT)

    # fmt: off
    model_dir: Annotated[str, Setting(GROUPS[0], "Folder that holds the models")] = "models"
    gpu_gb: Annotated[float | None, Setting(
        GROUPS[0], "The card's memory in GB of 2**30 bytes; 0.93 of it is taken to be usable",
        above=0, default_help="none: tables of what is needed")] = None
    generate: Annotated[bool, Setting(
        GROUPS[0], "Plan generating instead of training, for each precision, from `batch_size`, "
        "`length` and `prefix_length`")] = False
    length: Annotated[int | None, Setting(
        GROUPS[0], "With --generate: tokens to generate for each text", at_least=1,
        default_help="100 and 1023")] = None
    prefix_length: Annotated[int | None, Setting(
        GROUPS[0], "With --generate: tokens of a prefix", at_least=1, default_help="1")] = None
    # fmt: on


def _plan_generating(hparams: HParams, name: str, own: CardSettings, batch: int | None) -> int:
    plans = load_module("generation.memory_plan")
    settings = GenerationMemorySettings(
        hparams, batch_size=1 if batch is None else batch, prefix_length=own.prefix_length or 1
    )  # checks them
    prefix_length = settings.prefix_length
    lengths = [own.length] if own.length else [100, settings.length]
    if own.gpu_gb is None:
        batches = [1, 8, 20] if batch is None else [batch]
        found = plans.plans(hparams, batches, lengths, prefix_length)
    else:
        limit = usable_bytes(own.gpu_gb)
        found = plans.largest_batches(hparams, limit, lengths, prefix_length, batch)
    if own.gpu_gb is None:
        lines = [plans.table(found)]
    else:
        lines = [f"{plans.as_call(plan, name)}: {_megabytes(plan)}" for plan in found]
    complaint = f"{name} needs more than {USABLE:.0%} of {own.gpu_gb:g} GB" if own.gpu_gb else ""
    return _tell(lines, [plans.as_dict(plan, name) for plan in found], own, complaint)


def _plan_training(hparams: HParams, name: str, own: CardSettings, options: Options) -> int:
    plans = load_module("training.memory_plan")
    flag = "use_memory_saving_gradients"
    choices = [options[flag]] if flag in options else [False, True]
    found = [plans.memory_plan(hparams, **options | {flag: choice}) for choice in choices]
    if own.gpu_gb is not None:
        limit = usable_bytes(own.gpu_gb)
        fitting = [plan for plan in found if plan.total <= limit]
        found = fitting if options else plans.fitting_plans(hparams, limit)
    if own.gpu_gb is None:
        lines = [f"{flag}={choice}:\n{plan}" for choice, plan in zip(choices, found, strict=True)]
    else:
        lines = [f"{plans.as_call(plan, name)}  # {_megabytes(plan)}" for plan in found]
    complaint = ""
    if own.gpu_gb is not None:
        complaint = (
            f"{name} with these settings needs more than {USABLE:.0%} of {own.gpu_gb:g} GB, about "
            "what such a card leaves. Take a smaller model, or see what --train_last_blocks, "
            "--sequence_length, --optimizer and --precision save"
        )
    return _tell(lines, [plans.as_dict(plan, name) for plan in found], own, complaint)


def _megabytes(plan: Any) -> str:
    return f"{plan.total / MEGABYTE:,.0f} MB"


def _tell(lines: list[str], found: list[dict[str, Any]], own: CardSettings, complaint: str) -> int:
    """Prints plans, for people or for programs; the exit status: 1, and why, if there is none."""
    if own.json:
        print_json(found)
    else:
        for line in lines:
            say(line)
    if not found:
        complain(f"{PROGRAM}: nothing fits: {complaint}")
    return 0 if found else 1


def _memory(options: Options) -> int:
    own = CardSettings(**take_options(options, fields_of(CardSettings)))
    name = options.pop("model_name", MemoryPlanSettings.model_name)
    hparams = _sizes(name, own.model_dir)
    if own.generate:
        batch = options.pop("batch_size", None)
        for flag, value in options.items():
            raise ValueError(f"{flag}={value!r} has no meaning with generate=True")
        return _plan_generating(hparams, name, own, batch)
    for flag in ("length", "prefix_length"):
        if getattr(own, flag) is not None:
            raise ValueError(f"{flag}={getattr(own, flag)} has no meaning without generate=True")
    return _plan_training(hparams, name, own, options)


def _sizes(model_name: str, model_dir: str) -> HParams:
    """The sizes of the model in a folder, or else of the published one."""
    try:
        return read_hparams(model_folder(model_dir, model_name))
    except FileNotFoundError:
        with contextlib.suppress(ValueError):
            return published_hparams(model_name)
        raise


MEMORY = Command(
    run=_memory,
    summary="Tell how much memory training or generating needs, or what fits in yours. For "
    "training, the best comes first.",
    examples=(
        "gpt_2_simple memory 774M --gpu_gb 16",
        "gpt_2_simple memory 1558M --generate",
        "gpt_2_simple memory --model_name 355M --batch_size 2 --optimizer adafactor",
    ),
    settings=[MemoryPlanSettings],
    own_settings=CardSettings,
    positional="model_name",
)
