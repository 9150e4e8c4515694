# SPDX-License-Identifier: Apache-2.0
"""quip-vllm quantize | plan: what a run is told, and what it says."""

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from quip_vllm.cli.options import add_device, add_trust, check_writable
from quip_vllm.formats.spec import FORMATS, methods
from quip_vllm.quantizer.plan_file import Planned, most_common
from quip_vllm.quantizer.settings import (
    AMOUNTS,
    BUNDLE,
    EPOCHS,
    NARROWEST,
    ROUNDING_STEPS,
    ROUNDINGS,
    SELF,
    SPLITS,
    TEXT_AMOUNT,
    TUNINGS,
    Settings,
    default_code,
)

if TYPE_CHECKING:
    from quip_vllm.quantizer.planning import Target


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """The options of ``quantize``."""
    parser.add_argument("model", help="folder or hub name of a bf16, fp16 or fp32 model (safetensors)")
    parser.add_argument("out", type=Path, help="new folder for the checkpoint")
    _add_settings(parser)
    parser.add_argument("--plan", type=Path, help="code and bits of every layer, as `quip-vllm plan` writes them")
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished run in OUT")
    parser.add_argument("--workers", type=int, metavar="N", help="search trellis codes in N processes of this machine")
    parser.add_argument("--ray", metavar="ADDRESS", help="search them on a Ray cluster: auto, or HOST:PORT")
    parser.epilog = "example: quip-vllm quantize MODEL OUT --method qtip --bits 2 --calibration text.txt"
    parser.set_defaults(run=_quantize)


def add_plan(parser: argparse.ArgumentParser) -> None:
    """The options of ``plan``."""
    parser.add_argument("model", help="folder or hub name of a bf16, fp16 or fp32 model (safetensors)")
    _add_settings(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the plan there, for quantize --plan")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw bits and losses there (PNG; needs matplotlib)")
    parser.epilog = "example: quip-vllm plan MODEL --method quip_sharp --bits 2.5 --out plan.json"
    parser.set_defaults(run=_plan)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """What a run and a plan are both told."""
    parser.add_argument(
        "--method",
        choices=list(methods()),
        help="quip_sharp: a lattice code, the fastest at 2 bits; qtip: a trellis code, the better quality; quip: equal "
        "steps, for 5 bits and more",
    )
    parser.add_argument(
        "--bits",
        help="quip_sharp: 2, 3, 4; qtip: 1 to 8 (hyb: 1 to 4); quip: 2 to 8; or with a decimal point, as 2.5 or 3.0: "
        "the mean over layers whose bits are planned first",
    )
    parser.add_argument("--size", help="of all tensors, as 1.2GB or 900MB, in place of --bits: bits are planned first")
    parser.add_argument(
        "--code",
        choices=[name for name, one in FORMATS.items() if one.quantized],
        help="code of the method (default of qtip: hyb up to 2 bits, 1mad above)",
    )
    parser.add_argument(
        "--calibration",
        default=Settings.calibration,
        metavar="SOURCE[,SOURCE...]",
        help="calibration text: bundle (default), a text of many kinds that the package carries; self, text that the "
        "model itself writes; a file; hub:DATASET[:SPLIT[:COLUMN]]; or several, with equal shares",
    )
    counts, lengths = (
        f"bundle: {bundle}; self: {own}; others: {text}"
        for bundle, own, text in zip(AMOUNTS[BUNDLE], AMOUNTS[SELF], TEXT_AMOUNT, strict=True)
    )
    parser.add_argument("--sequences", type=int, help=f"calibration sequences ({counts})")
    parser.add_argument("--sequence-length", type=int, help=f"tokens in each ({lengths})")
    parser.add_argument(
        "--seed",
        type=int,
        default=Settings.seed,
        help="of the random signs and of the choice of calibration text; equal seeds give equal files (%(default)s)",
    )
    parser.add_argument(
        "--hadamard-block",
        default="full",
        metavar="N|full",
        help="rotate whole rows or their chunks (full, default; see --split), or blocks of at most N, a power of two",
    )
    parser.add_argument(
        "--split",
        type=int,
        metavar="R",
        help="cut the side that tensor parallelism cuts into R equal chunks, and rotate each by itself: vLLM can then "
        f"serve on R ranks or a divisor of R (default {', '.join(map(str, SPLITS))}: the first that divides the "
        f"attention heads and leaves each chunk {NARROWEST} numbers; else 1, whole rows, as with experts)",
    )
    parser.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        default=Settings.rounding,
        help="ldlq: errors feed back into the weights that follow; nearest: they do not; and for quip, greedy: ldlq, "
        "then each weight again; discquant: up or down as the loss of the whole model says (default %(default)s)",
    )
    parser.add_argument("--rounding-steps", type=int, metavar="N", help=f"of discquant (default {ROUNDING_STEPS})")
    parser.add_argument(
        "--drift-correction",
        type=float,
        metavar="SHARE",
        help="share of the error of earlier layers that each layer corrects, 0 to 1 (default 0.2; with discquant 0)",
    )
    parser.add_argument(
        "--token-weights",
        type=float,
        metavar="SHARE",
        help="share of a token's weight that follows how much the loss depends on it, 0 to 1, which takes a backward "
        "pass; in the rest all tokens count the same (default 0.2 with --two-sided, else 0)",
    )
    parser.add_argument(
        "--two-sided",
        action=argparse.BooleanOptionalAction,
        help="whether rounding errors feed back along the outputs, too (YAQA), which takes the same backward pass "
        "(default: with --rounding ldlq)",
    )
    parser.add_argument(
        "--hessians", metavar="FOLDER", help="where the backward pass leaves its result, or an earlier run has left it"
    )
    parser.add_argument(
        "--tune",
        choices=TUNINGS,
        default=Settings.tune,
        help="none: nothing is fitted to the codes; refit: su and sv, by least squares; blocks: then su, sv and norms "
        "of each decoder layer are trained by themselves; full: then those of all layers are trained together (default "
        "%(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help=f"how often --tune full goes through the calibration text, at most (default {EPOCHS})",
    )
    parser.add_argument("--ignore", nargs="+", default=[], metavar="REGEX", help="layers to leave as they are")
    parser.add_argument("--override", nargs="+", default=[], metavar="REGEX=BITS", help="other bits for some layers")
    for option, layer in (("--lm-head", "output head"), ("--embedding", "input embedding")):
        parser.add_argument(
            option, type=int, metavar="BITS", help=f"quantize the {layer} too; where head and embedding are tied, both"
        )
    add_device(parser, "runs, is rounded (on several: cuda:0,cuda:1) and is trained")
    add_trust(parser)


def _quantize(args: argparse.Namespace) -> int:
    from quip_vllm.quantizer.rounding.searchers import searchers
    from quip_vllm.quantizer.run import quantize

    if args.plan is not None:
        from quip_vllm.quantizer.plan_file import read_plan

        said = [option for option in ("method", "bits", "size", "code") if getattr(args, option) is not None]
        if said:
            raise ValueError(f"--plan says code and bits of every layer: leave --{' and --'.join(said)} away")
        planned = read_plan(args.plan)
        usual = most_common(planned)
        settings, target = _settings(args, usual.code, usual.bits, planned), None
    else:
        bits, target = _target(args)
        settings = _settings(args, _code(args, bits), bits)
    with searchers(args.workers, args.ray) as others:
        report = quantize(settings, args.out, args.resume, target, others)
    losses = [layer["proxy_loss"] for layer in report["layers"]]
    print(f"wrote {args.out}: {len(losses)} layers, mean proxy loss {sum(losses) / len(losses):.4g}")
    for name, weights in sorted(report.get("searched", {}).items()):
        print(f"{name} searched {weights / 1e6:.1f} million weights")
    print(f"serve it with: vllm serve {args.out} --gpu-memory-utilization 0.5")
    print("(vLLM reserves that share of the memory, on a CPU too, and does not start where less is free)")
    split = report["settings"]["split"]
    if split > 1:
        print(f"(on {split} tensor-parallel ranks or a divisor of it: {split} chunks of a row are rotated one by one)")
    elif settings.hadamard_block is None:
        print("(on one tensor-parallel rank, since rotations cover whole rows: --split R makes a model for R)")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from quip_vllm.checkpoint.store import write_json
    from quip_vllm.quantizer.plan_file import format_plan
    from quip_vllm.quantizer.planning import Target, make_plan_file

    for option, file in (("--out", args.out), ("--plot", args.plot)):
        if file:
            check_writable(file, option)
    if args.plot:
        from quip_vllm.quantizer.plan_plot import draw, require_matplotlib

        require_matplotlib()
    bits, target = _target(args)
    settings = _settings(args, _code(args, bits), bits)
    with tempfile.TemporaryDirectory(prefix="quip-vllm-plan-") as folder:
        plan = make_plan_file(settings, target or Target(float(bits), code=args.code), Path(folder))
    print(format_plan(plan))
    if args.out:
        write_json(args.out, plan)
    if args.plot:
        draw(plan, args.plot)
    return 0


def _target(args: argparse.Namespace) -> "tuple[int, Target | None]":
    """--bits where it is a whole number, else bits that the method has, and what a plan is to reach."""
    from quip_vllm.quantizer.planning import Target

    if args.method is None or (args.bits is None) == (args.size is None):
        raise ValueError("give --method, and either --bits or --size (or, to quantize, a --plan)")
    if args.bits is not None and args.bits.isdecimal():
        return int(args.bits), None
    some = 4  # every method has them
    if args.bits is not None:
        try:
            return some, Target(float(args.bits), code=args.code)
        except ValueError as error:
            said = str(error) if "give bits" in str(error) else f"--bits is {args.bits}: give a number, as 2 or 2.5"
            raise ValueError(said) from None
    number, unit = args.size.rstrip("kMGTB"), args.size.lstrip("0123456789.")
    if unit not in _UNITS or not number.replace(".", "", 1).isdecimal():
        raise ValueError(f"--size is {args.size}: give a number and a unit, as 900MB or 1.2GB")
    return some, Target(None, int(float(number) * _UNITS[unit]), args.code)


_UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _code(args: argparse.Namespace, bits: int) -> str:
    code: str = args.code or default_code(args.method, bits)
    method = FORMATS[code].method
    if method != args.method:
        raise ValueError(f"--code is {code}, which belongs to {method}: give --method {method}, or leave --code away")
    return code


def _settings(args: argparse.Namespace, code: str, bits: int, planned: Planned = ()) -> Settings:
    return Settings(
        model=args.model,
        code=code,
        bits=bits,
        plan=planned,
        calibration=args.calibration,
        sequences=args.sequences,
        sequence_length=args.sequence_length,
        seed=args.seed,
        hadamard_block=_block(args.hadamard_block),
        split=args.split,
        ignore=tuple(args.ignore),
        overrides=tuple(_override(item) for item in args.override),
        rounding=args.rounding,
        rounding_steps=args.rounding_steps,
        drift_correction=args.drift_correction,
        token_weights=args.token_weights,
        two_sided=args.two_sided,
        hessians=args.hessians,
        tune=args.tune,
        epochs=args.epochs,
        lm_head=args.lm_head,
        embedding=args.embedding,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )


def _block(text: str) -> int | None:
    if text == "full":
        return None
    if not text.isdecimal() or int(text) < 2 or int(text) & (int(text) - 1):
        raise ValueError(f"--hadamard-block is {text}: give a power of two of at least 2, or full")
    return int(text)


def _override(text: str) -> tuple[str, int]:
    pattern, _, bits = text.rpartition("=")
    if not pattern or not bits.isdecimal():
        raise ValueError(f"--override is {text}: give REGEX=BITS, for example 'down_proj=4'")
    return pattern, int(bits)
