"""`python -m bench threads`: many threads on one pipeline. Is each answer that of a lone run, and what do threads cost?

Each thread makes a random mix of calls: predictions of several sizes, gradients, prompts, images, and switches of the
LoRA's strength where it is set at run time. An answer is right if it equals, bit for bit, the lone run's at one of the
strengths. Then one prediction is timed with one thread and with more, in turns. Engines with text gradients are built
first, which takes minutes, once.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.options import A_MODEL, Parser, json_file, names
from bench.results import write
from engines.select import check_runs
from engines.variant import LORA_MODES

if TYPE_CHECKING:
    from smooth_rt.pipeline import SmoothPipeline

__all__ = ["STRENGTHS", "jobs", "main", "mixed", "throughput"]

ENGINES = ("openvino", "onnxruntime", "inductor", "eager")
STRENGTHS = (0.3, 1.0)
SWITCH = 0.02  # of the calls set another strength
PROMPTS = ("dog face on yellow background", "tomato on blue background", "rocket")
TEXT = "encoder_hidden_states"
TIMED = 1.0  # seconds of each timing
ROUNDS = 5

Job = Callable[["SmoothPipeline"], Tensor]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print.

    Raises:
        SmoothRTError: an option is wrong or an engine does not work.
    """
    parser = Parser(prog="smooth-rt bench threads", description=__doc__)
    parser.add_argument("--model", default="default", help=f"{A_MODEL}; default: the shipped one")
    parser.add_argument("--lora", default="default", help="a hub id, a folder or a file; default: the shipped one")
    parser.add_argument(
        "--lora-mode", choices=LORA_MODES, default="fused", help="runtime and refit switch strengths; default: fused"
    )
    parser.add_argument(
        "--engine", type=names(*ENGINES), default=ENGINES[:2], help=f"of {', '.join(ENGINES)}; default: both first"
    )
    parser.add_argument("--threads", type=int, default=8, help="default: 8")
    parser.add_argument("--calls", type=int, default=300, help="of each thread; default: 300")
    parser.add_argument("--output", type=json_file, help="a JSON file of the figures")
    options = parser.asked(list(sys.argv[1:] if argv is None else argv), ("threads", "calls"), ("model", "lora"))
    if options is None:
        return
    for backend in options.engine:
        check_runs(backend)
    rows = [_measured(options, backend) for backend in options.engine]
    _print(rows, options)
    write(rows, options.output)


def jobs(pipe: SmoothPipeline) -> dict[str, Job]:
    """The calls of the mix, by name; gradients where the engine has them.

    Each gives the same tensor at each call, if nothing goes wrong.
    """
    embeds = pipe.encode_prompt(PROMPTS)
    height, width = pipe.image_size(None, None)
    noise = pipe.draw_noise(4, height, width, torch.Generator().manual_seed(0))
    wide = pipe.draw_noise(1, height, 2 * width, torch.Generator().manual_seed(1))

    def image(seed: int) -> Job:
        def run(pipe: SmoothPipeline) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return pipe(PROMPTS[seed], num_inference_steps=2, generator=generator, output_type="latent").latents

        return run

    def gradient(row: int) -> Job:
        def run(pipe: SmoothPipeline) -> Tensor:
            at = slice(row, row + 1)
            output, grads = pipe.vjp(noise[at], 400, embeds[at], TEXT, torch.ones_like(noise[at]))
            return torch.cat([output.flatten(), grads[TEXT].flatten()])

        return run

    gradients = {"gradient": gradient(0), "other gradient": gradient(1)} if pipe.has_gradient(TEXT) else {}
    return {
        "one row": lambda pipe: pipe.predict(noise[:1], 500, embeds[:1]),
        "other text": lambda pipe: pipe.predict(noise[:1], 500, embeds[1:2]),
        "guided": lambda pipe: pipe.predict(noise[1:2], 300, embeds[1:2], embeds[2:], 7.5),
        "three rows": lambda pipe: pipe.predict(noise[1:], 100, embeds),
        "wide": lambda pipe: pipe.predict(wide, 700, embeds[2:]),
        "prompts": lambda pipe: pipe.encode_prompt(PROMPTS[:2]),
        "long prompt": lambda pipe: pipe.encode_prompt("red " * 20),
        "decode": lambda pipe: torch.as_tensor(pipe.decode(noise[:1], "pt")),
        "image": image(0),
        "other image": image(1),
        **gradients,
    }


def mixed(pipe: SmoothPipeline, threads: int, calls: int, strengths: Sequence[float] = ()) -> Counter[str]:
    """Make the mix of calls and count the answers: "right", "wrong" and each error's text.

    Args:
        threads: that call at once.
        calls: of each thread.
        strengths: that the threads switch between; none where the LoRA is fused.
    """
    asked = jobs(pipe)
    lone: dict[str, list[Tensor]] = {name: [] for name in asked}
    for strength in strengths or (None,):
        if strength is not None:
            pipe.set_lora_strength(strength)
        for name, job in asked.items():
            lone[name].append(job(pipe))
    counts: list[Counter[str]] = [Counter() for _ in range(threads)]  # one per thread: an increment is not atomic

    def run(number: int) -> None:
        random, count = Random(number), counts[number]
        for _ in range(calls):
            try:
                if strengths and random.random() < SWITCH:
                    pipe.set_lora_strength(random.choice(strengths))
                    count["switched"] += 1
                    continue
                name = random.choice(list(asked))
                answer = asked[name](pipe)
                right = any(torch.equal(answer, one) for one in lone[name])
                count["right" if right else f"wrong: {name}"] += 1
            except Exception as error:  # counted, whatever it is
                count[f"{type(error).__name__}: {error}"] += 1

    _at_once([lambda number=number: run(number) for number in range(threads)])  # type: ignore[misc]
    return sum(counts, Counter())


def throughput(pipe: SmoothPipeline, threads: int) -> dict[int, float]:
    """Predictions of one row per second, with one thread and with `threads`: medians of turns."""
    job = jobs(pipe)["one row"]
    seconds: dict[int, list[float]] = {1: [], threads: []}
    job(pipe)
    for _ in range(ROUNDS):
        for count, rates in seconds.items():
            done: Counter[int] = Counter()
            start = time.perf_counter()

            def run(number: int, start: float = start, done: Counter[int] = done) -> None:
                while time.perf_counter() - start < TIMED:
                    job(pipe)
                    done[number] += 1

            _at_once([lambda number=number: run(number) for number in range(count)])  # type: ignore[misc]
            rates.append(done.total() / (time.perf_counter() - start))
    return {count: sorted(rates)[ROUNDS // 2] for count, rates in seconds.items()}


def _at_once(works: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _measured(options: argparse.Namespace, backend: str) -> dict[str, Any]:
    from smooth_rt.pipeline import SmoothPipeline

    print(f"measuring {backend}", file=sys.stderr, flush=True)
    fused = options.lora_mode == "fused"
    gradients = "text" if backend in ENGINES[:2] else ()
    with SmoothPipeline.from_pretrained(
        options.model, options.lora, engine=backend, lora_mode=options.lora_mode, gradients=gradients
    ) as pipe:
        counts = mixed(pipe, options.threads, options.calls, () if fused else STRENGTHS)
        rates = throughput(pipe, 2)
    return {"engine": backend, "lora_mode": options.lora_mode, "answers": dict(counts), **_rates(rates)}


def _rates(rates: Mapping[int, float]) -> dict[str, float]:
    one, two = rates.values()
    return {"one_thread_per_s": one, "two_threads_per_s": two, "two_threads": two / one}


def _print(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    title = f"{options.model}, LoRA {options.lora_mode}: {options.threads} threads with {options.calls} calls each"
    table = Table("engine", "right", "switches", "all others", "calls/s, one thread", "two threads", title=title)
    for row in rows:
        answers = Counter(row["answers"])
        right, switched = answers.pop("right", 0), answers.pop("switched", 0)
        others = "; ".join(f"{count} {what}" for what, count in answers.items()) or "0"
        two = f"{row['two_threads_per_s']:.1f} ({row['two_threads']:.2f} times)"
        table.add_row(row["engine"], str(right), str(switched), others, f"{row['one_thread_per_s']:.1f}", two)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
