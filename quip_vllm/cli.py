# SPDX-License-Identifier: Apache-2.0
"""quip-vllm quantize | convert | evaluate | inspect | verify | doctor. Exits with 2 and one sentence on bad input."""

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quip_vllm import __version__
from quip_vllm.formats.spec import FORMATS, methods
from quip_vllm.quantizer.plan_file import Planned, most_common
from quip_vllm.quantizer.settings import AMOUNTS, BUNDLE, SELF, TEXT_AMOUNT, TUNINGS, Settings, default_code

if TYPE_CHECKING:
    from quip_vllm.quantizer.planning import Target


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parsed = _parser().parse_args(arguments)
    try:
        status = int(parsed.run(parsed))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end of the process
        return 128 + signal.SIGPIPE
    except (ValueError, RuntimeError, OSError) as error:
        print(f"quip-vllm {parsed.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"quip-vllm {parsed.command}: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="quip-vllm", description="2- to 4-bit QuIP# and QTIP weights for vLLM.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_quantize(commands.add_parser("quantize", help="write a quantized checkpoint of a Hugging Face causal LM"))
    _add_plan(commands.add_parser("plan", help="which bits each layer would get for a mean of bits or a size"))
    _add_convert(
        commands.add_parser(
            "convert", help="write a QuIP#, QTIP, YAQA or EXL3 checkpoint as ours, without a new rounding"
        )
    )
    evaluate = commands.add_parser("evaluate", help="perplexity, and KL divergence to a reference, on a text")
    evaluate.add_argument("models", nargs="+", metavar="model", help="folders or hub names; also checkpoints of ours")
    evaluate.add_argument(
        "--text", required=True, action="append", help="UTF-8 text, tokenized whole; may be given several times"
    )
    evaluate.add_argument("--reference", help="the original model: adds KL divergence and top-1 agreement")
    evaluate.add_argument(
        "--noise-floor", action="store_true", help="measure the reference in bf16, too, against itself in float32"
    )
    evaluate.add_argument("--sequence-length", type=int, default=2048, help="tokens a window (default 2048)")
    evaluate.add_argument("--windows", type=int, help="only the first N windows of each text")
    evaluate.add_argument(
        "--start-token", action="store_true", help="begin each window with the tokenizer's start token, as Gemma needs"
    )
    evaluate.add_argument(
        "--document-start",
        metavar="REGEX",
        help="how lines begin with which documents begin: standard errors are then by document, not by window",
    )
    evaluate.add_argument("--json", type=Path, help="write the figures there as well")
    _add_trust(evaluate)
    evaluate.set_defaults(run=_evaluate)
    inspect = commands.add_parser("inspect", help="every layer of a quantized checkpoint, and its totals")
    inspect.add_argument("checkpoint", type=Path)
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")
    inspect.add_argument("--check", action="store_true", help="only say whether every tensor is there, in one sentence")
    _add_trust(inspect)
    inspect.set_defaults(run=_inspect)
    verify = commands.add_parser(
        "verify", help="whether vLLM serves what the checkpoint holds: loads it and compares with transformers"
    )
    verify.add_argument("checkpoint", type=Path)
    verify.add_argument(
        "--memory", type=float, default=0.2, help="share of the memory that vLLM may take (default %(default)s)"
    )
    _add_trust(verify)
    verify.set_defaults(run=_verify)
    doctor = commands.add_parser("doctor", help="what this machine has, and which backend serves which format")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trust-remote-code", action="store_true", help="let Python code of the model's files run")


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or hub name of a bf16, fp16 or fp32 model (safetensors)")
    parser.add_argument("out", type=Path, help="new folder for the checkpoint")
    _add_settings(parser)
    parser.add_argument("--plan", type=Path, help="code and bits of every layer, as `quip-vllm plan` writes them")
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished run in OUT")
    parser.epilog = "example: quip-vllm quantize MODEL OUT --method qtip --bits 2 --calibration text.txt"
    parser.set_defaults(run=_quantize)


def _add_plan(parser: argparse.ArgumentParser) -> None:
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
        help="quip_sharp: a lattice code, the fastest at 2 bits; qtip: a trellis code, the better quality",
    )
    parser.add_argument(
        "--bits",
        help="quip_sharp: 2, 3, 4; qtip: 1 to 8 (hyb: 1 to 4); or a fraction, as 2.5: the mean over layers whose bits "
        "are planned first",
    )
    parser.add_argument("--size", help="of all tensors, as 1.2GB or 900MB, in place of --bits: bits are planned first")
    parser.add_argument(
        "--code",
        choices=list(FORMATS),
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
        help="rotate whole rows (full, default) or blocks of at most N (a power of two), as tensor parallelism needs",
    )
    parser.add_argument(
        "--drift-correction",
        type=float,
        default=Settings.drift_correction,
        metavar="SHARE",
        help="how much of the error that earlier layers left a layer is asked to mend, 0 to 1 (default %(default)s)",
    )
    parser.add_argument(
        "--token-weights",
        action=argparse.BooleanOptionalAction,
        default=Settings.token_weights,
        help="let a token count as much as the loss feels it, which takes a backward pass (default %(default)s)",
    )
    parser.add_argument(
        "--two-sided",
        action=argparse.BooleanOptionalAction,
        default=Settings.two_sided,
        help="let rounding errors feed back along the outputs, too (YAQA), which takes the same (default %(default)s)",
    )
    parser.add_argument(
        "--hessians", metavar="FOLDER", help="where the backward pass leaves its result, or an earlier run has left it"
    )
    parser.add_argument(
        "--tune",
        choices=TUNINGS,
        default=Settings.tune,
        help="what is fitted to the codes: nothing; su and sv by least squares (refit); and norms, by training of each "
        "decoder layer (blocks), and of all together (full), which takes longest (default %(default)s)",
    )
    parser.add_argument("--ignore", nargs="+", default=[], metavar="REGEX", help="layers to leave as they are")
    parser.add_argument("--override", nargs="+", default=[], metavar="REGEX=BITS", help="other bits for some layers")
    for option, layer in (("--lm-head", "output head"), ("--embedding", "input embedding")):
        parser.add_argument(
            option, type=int, metavar="BITS", help=f"quantize the {layer} too; where head and embedding are tied, both"
        )
    _add_trust(parser)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder or hub name of a QuIP#, QTIP, YAQA, GuidedQuant-QTIP or EXL3 checkpoint")
    parser.add_argument("out", type=Path, help="new folder for the checkpoint")
    parser.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="folder or hub name to take the tokenizer from, which published QuIP# and QTIP checkpoints lack (default: "
        "the folder that config.json names as the origin)",
    )
    parser.add_argument(
        "--evaluate", metavar="TEXT", help="measure one window of a UTF-8 text, and warn where the result is no model"
    )
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished conversion in OUT")
    parser.epilog = (
        "example: quip-vllm convert relaxml/Llama-2-7b-E8P-2Bit OUT --tokenizer meta-llama/Llama-2-7b-hf "
        "--evaluate text.txt"
    )
    parser.set_defaults(run=_convert)


WINDOW = 2048
"""Tokens of the window that `convert --evaluate` measures, where the model has as many positions."""
SUSPICIOUS = 500.0
"""A perplexity above it is that of a model whose rotations or codes are wrong, whatever the text."""


def _convert(args: argparse.Namespace) -> int:
    from quip_vllm.checkpoint.config import positions
    from quip_vllm.checkpoint.convert import convert
    from quip_vllm.checkpoint.hub import load_config, local_folder
    from quip_vllm.evaluation.loading import check_complete
    from quip_vllm.evaluation.report import evaluate

    source = local_folder(args.source)
    check_complete(source)
    done = convert(source, args.out, args.tokenizer, args.resume)
    print(
        f"wrote {args.out}: {done['layers']} quantized layers in {done['shards']} files, as they are in {args.source}"
    )
    if args.evaluate:
        length = min(WINDOW, positions(load_config(args.out)) or WINDOW)
        measured = evaluate([str(args.out)], [args.evaluate], sequence_length=length, windows=1)
        found = measured["results"][0]["perplexity"]
        print(f"perplexity of one window of {length} tokens: {found:.4f}")
        if found > SUSPICIOUS:
            print(
                f"WARNING: that is no language model's: the source is damaged, or its rotations are not those that "
                f"its config.json says; do not serve {args.out}",
                file=sys.stderr,
            )
    return 0


def _quantize(args: argparse.Namespace) -> int:
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
    report = quantize(settings, args.out, args.resume, target)
    losses = [layer["proxy_loss"] for layer in report["layers"]]
    print(f"wrote {args.out}: {len(losses)} layers, mean proxy loss {sum(losses) / len(losses):.4g}")
    print(f"serve it with: vllm serve {args.out} --gpu-memory-utilization 0.5")
    print("(vLLM reserves that share of the memory, on a CPU too, and does not start where less is free)")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from quip_vllm.checkpoint.store import write_json
    from quip_vllm.quantizer.plan_file import format_plan
    from quip_vllm.quantizer.planning import Target, make_plan_file

    for option, file in (("--out", args.out), ("--plot", args.plot)):
        if file:
            _check_writable(file, option)
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
        ignore=tuple(args.ignore),
        overrides=tuple(_override(item) for item in args.override),
        drift_correction=args.drift_correction,
        token_weights=args.token_weights,
        two_sided=args.two_sided,
        hessians=args.hessians,
        tune=args.tune,
        lm_head=args.lm_head,
        embedding=args.embedding,
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


def _evaluate(args: argparse.Namespace) -> int:
    from quip_vllm.checkpoint.store import write_json
    from quip_vllm.evaluation.report import evaluate, format_report

    if args.json:
        _check_writable(args.json, "--json")
    result = evaluate(
        args.models,
        args.text,
        args.reference,
        args.sequence_length,
        args.windows,
        args.start_token,
        args.document_start,
        args.noise_floor,
        args.trust_remote_code,
    )
    print(format_report(result["results"]))
    if args.json:
        write_json(args.json, result)
    return 0


def _check_writable(file: Path, option: str) -> None:
    """Raises ValueError where a file cannot be made; leaves nothing."""
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(f"{option} is {file}: give a file in a folder that exists")
    try:
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise ValueError(
            f"{option} is {file}: nothing can be written there ({error.strerror}); give another file"
        ) from None


def _inspect(args: argparse.Namespace) -> int:
    from quip_vllm.checkpoint.inspection import format_inspection, inspect

    result = inspect(args.checkpoint)
    if args.check:
        from quip_vllm.evaluation.loading import check_complete

        check_complete(args.checkpoint, args.trust_remote_code)
        print(f"{args.checkpoint}: {result['totals']['layers']} quantized layers, and every tensor is there")
        return 0
    print(json.dumps(result, indent=2) if args.json else format_inspection(result))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from quip_vllm.checkpoint.layers import read_config
    from quip_vllm.evaluation.verification import TOLERANCE, expected_log_probabilities, largest_difference
    from quip_vllm.vllm_plugin.serving import prompt_log_probabilities

    read_config(args.checkpoint)  # any other model is refused
    tokens, expected = expected_log_probabilities(args.checkpoint, args.trust_remote_code)
    served = prompt_log_probabilities(args.checkpoint, tokens, args.memory, args.trust_remote_code)
    found = largest_difference(expected, served)
    said = f"log probabilities of {len(tokens)} tokens in vLLM and in transformers differ by up to {found:.2g}"
    if found > TOLERANCE:
        print(
            f"quip-vllm verify: {args.checkpoint} is not served as it is stored: {said}, {TOLERANCE:g} is rounding; "
            "do not serve this model",
            file=sys.stderr,
        )
        return 1
    print(f"{args.checkpoint} is served as it is stored: {said}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from quip_vllm.doctor import report

    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
