"""megamoe generate: texts from a model whose experts are spread over ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megamoe.catalog.wording import plural
from megamoe.launch.cli.demo import Launcher
from megamoe.launch.cli.flags import flag, takes
from megamoe.launch.cli.launch import say_event
from megamoe.launch.output import Output, emit, say
from megamoe.launch.terminal import Bar, Format, compile_kernels, exit_codes, parse_waves

if TYPE_CHECKING:
    from megamoe.launch.generation.generate import GenerateReport
    from megamoe.launch.generation.prompts import Given


FLAGS = {  # by the names of GenerateRequest
    "ranks": flag(int, "Processes that share the experts, and the prompts.", 2),
    "max_new_tokens": flag(int, "Tokens of a text at most.", 128),
    "raw": flag(bool, "Leave out the model's chat template.", False, "--raw"),
    "experts": flag(str, "checkpoint, mxfp4 or bf16: how experts are held.", "checkpoint"),
    "check": flag(bool, "Generate again on one rank, and compare the tokens.", False, "--check"),
    "deadline_s": flag(float, "Seconds that a rank may be kept waiting in one call.", 60.0),
    "run": flag(str | None, "Name of the run, for megamoe doctor --run."),
}


@takes(FLAGS)
def generate(
    model: Annotated[
        Path, typer.Option(help="Checkpoint: config.json, safetensors and a tokenizer, as transformers has them.")
    ],
    given: dict[str, Any],
    text: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='Prompts as lines of JSON: {"id": "a", "text": "..."}, or "messages".')
    ] = None,
    launcher: Annotated[Launcher, typer.Option(help="What starts the ranks.")] = Launcher.spawn,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token; above it tokens are drawn.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draws from the most likely tokens that make up this much.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draws from so many most likely tokens; 0 from all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the draws; they do not depend on the ranks.")] = 0,
    waves: Annotated[str, typer.Option(help='A number, relative sizes such as 1,2,1, or "auto".')] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or npu; what there is by default.")] = None,
    restarts: Annotated[int, typer.Option(help="How often the group comes back after a rank is lost.")] = 0,
    output: Output = Format.table,
) -> None:
    """Generate texts, prompts spread over ranks; no text depends on the others or on the number of ranks."""
    with exit_codes():
        if temperature == 0 and (top_p != 1 or top_k != 0):
            raise ValueError("--top-p and --top-k are of draws, and --temperature 0 draws nothing: give one above 0")
        asked = _given(text, prompts)
        from megamoe.launch.cluster.recovery import RestartPolicy  # brings torch, which --help does not need
        from megamoe.launch.devices import present_device
        from megamoe.launch.generation.generate import GenerateRequest, run_generate
        from megamoe.model.generation.sampling import Sampling

        parsed: Any = parse_waves(waves)
        request = GenerateRequest(
            model,
            tuple(asked),
            launcher=launcher.value,
            sampling=Sampling(temperature, top_p, top_k, seed),
            waves=parsed,
            device=device or present_device(),
            policy=RestartPolicy(restarts),
            **given,
        )
        with Bar() as bar:
            compile_kernels()
            writer = _Writer(asked) if output is Format.table else None

            def on_text(prompt: str, more: str, done: bool) -> None:
                bar.stop()  # from here on the text shows how far it is
                if writer is not None:
                    writer.write(prompt, more, done)

            report = run_generate(request, on_text, say_event, bar.follow)
        emit(output, report, lambda: _print_figures(report))
        if report.identical is False:
            raise typer.Exit(1)


def _given(text: list[str] | None, prompts: Path | None) -> list[Given]:
    from megamoe.launch.generation.prompts import Given, read_prompts

    if (not text) == (prompts is None):
        raise ValueError("give prompts with --text, or a file of them with --prompts")
    if prompts is not None:
        return read_prompts(prompts)
    assert text is not None
    if not all(each for each in text):
        raise ValueError("--text is empty")
    return [Given(str(number), each) for number, each in enumerate(text, 1)]


class _Writer:
    """Texts on stdout as they come, each under its prompt's id where there are several."""

    def __init__(self, given: list[Given]) -> None:
        self._several = len(given) > 1
        self._open = ""

    def write(self, prompt: str, more: str, done: bool) -> None:
        if self._several and prompt != self._open:
            sys.stdout.write(f"[{prompt}] ")
        self._open = prompt
        sys.stdout.write(more + ("\n" if done else ""))
        sys.stdout.flush()


def _print_figures(report: GenerateReport) -> None:
    """What the texts took, in a line."""
    each = f", {report.tpot_ms:.0f} ms a token after that" if report.tpot_ms is not None else ""
    hidden = f", {report.hidden_percent:.0f} % of communication hidden" if report.hidden_percent is not None else ""
    say(
        f"{plural(report.new_tokens, 'token')} on {plural(report.ranks, 'rank')} ({report.launcher}): "
        f"{report.tokens_per_s:.1f} tokens/s, first after {report.ttft_ms:.0f} ms{each}{hidden}"
    )
    if report.identical is not None:
        verdict = "identical" if report.identical else "different"
        say(f"one rank: {report.one_rank_tokens_per_s:.1f} tokens/s, every token: {verdict}")
