# SPDX-License-Identifier: Apache-2.0
"""quip-vllm and its commands. Bad input ends with exit code 2 and one sentence."""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from quip_vllm import __version__
from quip_vllm.cli.options import add_device, add_trust, check_writable, printable
from quip_vllm.cli.quantizing import add_plan, add_quantize
from quip_vllm.cli.verifying import add_verify


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
        print(f"quip-vllm {parsed.command}: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"quip-vllm {parsed.command}: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="quip-vllm", description="2- to 4-bit QuIP# and QTIP weights for vLLM.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_quantize(commands.add_parser("quantize", help="write a quantized checkpoint of a Hugging Face causal LM"))
    add_plan(commands.add_parser("plan", help="which bits each layer would get for a mean of bits or a size"))
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
    evaluate.add_argument("--sequence-length", type=int, default=2048, help="tokens per window (default 2048)")
    evaluate.add_argument("--windows", type=int, help="only the first N windows of each text")
    evaluate.add_argument(
        "--start-token", action="store_true", help="begin each window with the tokenizer's start token, as Gemma needs"
    )
    evaluate.add_argument(
        "--document-start",
        metavar="REGEX",
        help="a document begins where a line begins so: standard errors are then by document, not by window",
    )
    evaluate.add_argument("--json", type=Path, help="write the figures there as well")
    add_device(evaluate)
    add_trust(evaluate)
    evaluate.set_defaults(run=_evaluate)
    inspect = commands.add_parser("inspect", help="every layer of a quantized checkpoint, and its totals")
    inspect.add_argument("checkpoint", type=Path)
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")
    inspect.add_argument("--check", action="store_true", help="only say whether every tensor is there, in one sentence")
    inspect.add_argument(
        "--tensor-parallel",
        type=int,
        metavar="N",
        help="only say on which numbers of ranks, up to N, it can be served",
    )
    add_trust(inspect)
    inspect.set_defaults(run=_inspect)
    verify = commands.add_parser(
        "verify", help="whether vLLM serves what the checkpoint holds: loads it and compares with transformers"
    )
    add_verify(verify)
    card = commands.add_parser("card", help="write a model card into a quantized checkpoint, and upload both if asked")
    card.add_argument("checkpoint", type=Path)
    card.add_argument(
        "--evaluation", type=Path, nargs="+", default=[], metavar="JSON", help="figures of quip-vllm evaluate --json"
    )
    card.add_argument("--push", metavar="REPOSITORY", help="upload the folder to this name on the Hugging Face hub")
    card.add_argument("--dry-run", action="store_true", help="print card and files; write and upload nothing")
    card.set_defaults(run=_card)
    doctor = commands.add_parser("doctor", help="what this machine has, and which backend serves which format")
    doctor.set_defaults(run=_doctor)
    return parser


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


def _evaluate(args: argparse.Namespace) -> int:
    from quip_vllm.checkpoint.store import write_json
    from quip_vllm.evaluation.report import evaluate, format_report

    if args.json:
        check_writable(args.json, "--json")
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
        args.device,
    )
    print(format_report(result["results"]))
    if args.json:
        write_json(args.json, result)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from quip_vllm.checkpoint.inspection import format_inspection, inspect

    if args.tensor_parallel is not None:
        from quip_vllm.vllm_plugin.ranks import format_verdict, verdict

        found = verdict(args.checkpoint, args.tensor_parallel, args.trust_remote_code)
        print(json.dumps(found, indent=2) if args.json else format_verdict(args.checkpoint, found))
        return 1 if found["refused"] else 0
    result = inspect(args.checkpoint)
    if args.check:
        from quip_vllm.evaluation.loading import check_complete

        check_complete(args.checkpoint, args.trust_remote_code)
        print(f"{args.checkpoint}: {result['totals']['layers']} quantized layers, and every tensor is there")
        return 0
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print("\n".join(map(printable, format_inspection(result).split("\n"))))
    return 0


def _card(args: argparse.Namespace) -> int:
    from quip_vllm.evaluation.card import card, files_to_push, push, write_card

    text, files = card(args.checkpoint, args.evaluation, args.push), files_to_push(args.checkpoint)
    if args.dry_run:
        print(text)
        for file in files:
            print(f"{file.stat().st_size:>15,}  {file.relative_to(args.checkpoint)}")
        return 0
    print(f"wrote {write_card(args.checkpoint, text)}")
    if args.push:
        print(f"uploaded: {push(args.checkpoint, args.push)}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from quip_vllm.doctor import report

    print(report())
    return 0
