"""Write docs/results.md and its plots from the files in benchmarks/results.

    python scripts/make_results.py

The document says nothing that is not in these files but how they were made. Each file has a section
below; a file that is not there has none in the document.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from splitfrozen.studies import plots
from splitfrozen.studies.findings import GAINS, scores, told_gains
from splitfrozen.studies.scores import measures

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "results.md"
PLOTS = ROOT / "docs" / "results"

Result = Mapping[str, Any]

HEAD = """\
# Results
Made by `scripts/make_results.py` from the files in `benchmarks/results`, which hold config, seeds,
environment and curves. What was tried and did not work is in [log.md](log.md).
"""

ACCURACY = """\
Every method is trained on the same rows, held by the same ten devices, in the same loop. The
learning rate of each data set, partition and method was chosen among the same candidates on rows
of the training data that they were not trained on, and then taken for all ranks and seeds.
Accuracy is that after the last epoch, on the test rows, which chose no rate. What all methods have
in common (epochs, warm-up, rows to tune on) was changed for SST-2 after trainings of SplitFrozen
with other settings had been seen to fail, on test rows as well as by their loss ([log.md](log.md)).
A cell is the mean over the seeds, ± half of the distance between them.
"""

FIGURE3 = """\
The paper's figure 3: what SplitFrozen gains over SplitLoRA as the labels get more skewed, from the
left to the right. The paper's largest gain is 172.1 %.
"""

TABLE3 = """\
The paper's Table III with a small Llama pretrained by `scripts/pretrain_gsm8k.py`, as Llama-3.2-1B
cannot be had without a hub. Both questions of the paper's table are in GSM8K's training split, so
what a model says to them is what it was trained on, in the paper too; exact match is on test rows.
"""

COMPRESSION = """\
What devices send against what is learnt: SplitFrozen with each codec of activations, at the
learning rate that was chosen with float16. Frames are counted, side data not; int8 and int4 go
through zstandard. Accuracies are means over two seeds, ± half of their distance; one standard error
of an accuracy on so many rows is a point. In bold: nothing else sends as little and scores as well.
"""

DITHER = """\
Is it worth drawing again what was rounded, as a frozen front makes each activation once
(`benchmarks/dither.py`)? Accuracy of each seed with Top-K rounded at random once, and anew for
every epoch, where there are several; bits a value and relative error of `ecsq` plain and with
subtractive dither.
"""
DRAWN = ("once", "anew")

TRANSFORMS = """\
Bits a value at equal error, a part more in each row; what is left out stands beside what it would
be added to (`benchmarks/transforms.py`). Bits are what a perfect coder would send, in the last row
what is sent.
"""

PERPLEXITY = """\
FedsLLM, averaged after {local_steps} steps, beside centralised LoRA with the very same batches, on
a small GPT-2 until it has converged (`benchmarks/perplexity.py`); none can be below {floor:.4f}.
The paper's Table IV has differences of at most {paper}, of perplexities about 1.04. How it is where
perplexities are larger, and before it has converged, is in [log.md](log.md).
"""


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    results = read()
    DOCUMENT.write_text(document(results))
    PLOTS.mkdir(exist_ok=True)
    for name in PLOTTED.keys() & results.keys():
        PLOTTED[name](results[name], PLOTS / f"{name}.png")
    print(f"wrote {DOCUMENT.relative_to(ROOT)} from {', '.join(results)}")


def read() -> dict[str, Result]:
    """The result files that have a section, in the order of the sections."""
    found = {}
    for name in SECTIONS:
        # What has several files has a folder of its own.
        for path in (RESULTS / f"{name}.json", RESULTS / name / f"{name}.json"):
            if path.exists():
                found[name] = json.loads(path.read_text())
    return found


def document(results: Mapping[str, Result]) -> str:
    """The whole document."""
    parts = [HEAD]
    parts += [f"{SECTIONS[name](result)}\n{_made_on(result)}" for name, result in results.items()]
    return "\n".join(parts)


def accuracy(result: Result) -> str:
    parts = ["## Accuracy of all methods", ACCURACY, *_tables(result)]
    parts += ["### Gains", *(f"- {line}" for line in told_gains(result["gains"])), ""]
    parts += ["On each data set, as means over the ranks:", "", *_gains(result), ""]
    parts += [
        "![Accuracy by method, partition and rank](results/accuracy.png)",
        "",
        *_tried(result),
    ]
    return "\n".join(parts)


def figure3(result: Result) -> str:
    gained = result["gains"]["each"]
    ranks = sorted({one["rank"] for one in gained})
    names = list(dict.fromkeys(one["partition"] for one in gained))
    gains = {(one["partition"], one["rank"]): one["over_splitlora_percent"] for one in gained}
    lines = [[name, *(_signed(gains.get((name, rank))) for rank in ranks)] for name in names]
    parts = ["## Gain over SplitLoRA by skew and rank", FIGURE3]
    parts += [_table(["alpha", *(f"rank {rank}, percent" for rank in ranks)], lines), ""]
    parts += ["![Gain over SplitLoRA by alpha and rank](results/figure3.png)", ""]
    return "\n".join([*parts, *_tables(result), *_tried(result)])


def table3(result: Result) -> str:
    parts = ["## Generation on GSM8K", TABLE3, *_tables(result)]
    for number, prompt in enumerate(result["config"]["experiment"]["prompts"]):
        said = [
            [result["labels"][one["method"]], _plain(one["answers"][number])]
            for one in result["answers"]
        ]
        parts += [_table(["question", _plain(prompt)], said), ""]
    return "\n".join([*parts, *_tried(result)])


def compression(result: Result) -> str:
    parts = ["## Compression", COMPRESSION]
    for dataset in dict.fromkeys(one["dataset"] for one in result["tradeoff"]):
        own = [one for one in result["tradeoff"] if one["dataset"] == dataset]
        lines = [
            [
                f"**{one['method']}**" if one["on_front"] else one["method"],
                f"{one['bytes'] / 1e6:.2f}",
                f"{one['times_less']:.1f}",
                f"{100 * one['accuracy']:.1f} ±{50 * (max(one['each']) - min(one['each'])):.1f}",
                f"{100 * (one['accuracy'] - own[0]['accuracy']):+z.1f}",
            ]
            for one in own
        ]
        header = ["codec", "MB", "times less", "accuracy in percent", "points"]
        parts += [f"### {dataset}", _table(header, lines), ""]
    parts += ["![Bytes against accuracy, with the Pareto front](results/compression.png)", ""]
    return "\n".join(parts)


def codecs(result: Result) -> str:
    names = ("ratio", "bits_per_element", "relative_error", "encode_mb_s", "decode_mb_s")
    parts = ["## Codecs", "MB/s are of float32, on one core (`benchmarks/codec.py`).", ""]
    for dataset, found in result["best"].items():
        lines = [
            [one["codec"], *(str(one[name]) for name in names)] for one in result[dataset]["codecs"]
        ]
        header = ["codec", "times less", "bits a value", "relative error", "encoding", "decoding"]
        limits = result[dataset]["limits"]
        parts += [
            f"### Activations of {dataset}",
            f"The smallest that loses at most 2 points: `{found['codec']}`, {found['ratio']} times "
            f"less, {100 * found['accuracy_loss']:.1f} points ({_seeds(found['by_seed'])} by "
            f"seed, on the rows that it was chosen by). What the SFT paper's setting "
            f"keeps has an entropy of {limits['entropy_bits_per_element']} bits a value; "
            f"zstandard makes it {limits['zstd_ratio']} times less.",
            "",
            *(_table(header, lines), ""),
        ]
    return "\n".join(parts)


def transforms(result: Result) -> str:
    parts = ["## What each part of `ecsq` buys", TRANSFORMS]
    for dataset, rows in result["tables"].items():
        lines = [[row["way"], *(f"{bits:.2f}" for bits in row["bits"])] for row in rows]
        header = ["bits a value at a relative error of", *(f"{one:g}" for one in result["errors"])]
        parts += [f"### Activations of {dataset}", _table(header, lines), ""]
    return "\n".join(parts)


def dither(result: Result) -> str:
    lines = [
        [dataset, codec, *(", ".join(f"{100 * one:.1f}" for one in own[way]) for way in DRAWN)]
        for codec, found in result["topk"].items()
        for dataset, own in found.items()
    ]
    parts = ["## Dither", DITHER, _table(["data set", "codec", *DRAWN], lines), ""]
    names = ("plain_bits", "plain_error", "dithered_bits", "dithered_error")
    lines = [
        [dataset, f"{row['step']:g}", *(f"{row[name]:.3f}" for name in names)]
        for dataset, rows in result["ecsq"].items()
        for row in rows
    ]
    header = ["data set", "step", "plain bits", "error", "dithered bits", "error"]
    return "\n".join([*parts, _table(header, lines), ""])


def perplexity(result: Result) -> str:
    names = ("centralized", "fedsllm")
    lines = [
        [
            str(row["rank"]),
            *(f"{row[name]:.5f}" for name in names),
            f"{row['difference']:+.5f}",
            f"{100 * (math.log(row['fedsllm']) / math.log(row['centralized']) - 1):+.1f}",
        ]
        for row in result["rows"]
    ]
    header = ["rank", "centralised", "FedsLLM", "difference", "of the loss, percent"]
    told = PERPLEXITY.format(**{name: result[name] for name in ("paper", "local_steps", "floor")})
    return "\n".join(["## Perplexity of FedsLLM", told, _table(header, lines), ""])


def planned(result: Result) -> str:
    lines = [
        [one["rule"], f"{one['plain_s']:.3f}", f"{one['codec_s']:.3f}"] for one in result["rules"]
    ]
    gap, crowd = result["gap"], result["crowd"]
    return "\n".join(
        [
            "## SplitFrozen's plan",
            "Makespans on the paper's network by the simulator, seconds",
            "(`splitfrozen plan experiments/splitfrozen-plan.toml`).",
            "",
            _table(["", result["plain_codec"], "the plan's codec"], lines),
            "",
            f"No plan can be faster than {result['bound_s']:.3f} s. Of {gap['instances']} drawn "
            f"networks {100 * gap['within_1_percent']:g} % are within 1 % of brute force, at most "
            f"{100 * gap['max']:.2f} % above and, where they share a medium, "
            f"{-100 * gap['min']:.2f} % below. {crowd['clients']} devices and "
            f"{crowd['subchannels']} subchannels take {crowd['cpu_s']:.2f} s of CPU.",
            "",
            "![Makespan over the rate of uplinks]"
            "(../benchmarks/results/splitfrozen-plan/splitfrozen-plan-uplink.png)",
            "",
        ]
    )


def planned_sft(result: Result) -> str:
    p1, p2, paper, there = (result[key] for key in ("p1", "p2", "paper", "at_paper_setting"))
    lines = [
        [
            name,
            *(f"{one['delay_s'][name] / 60:.1f}" for one in (result, there)),
            *(f"{one['bytes'][name] / 1e9:.1f}" for one in (result, there)),
            *(
                _saved(one[key].get(name))
                for key in ("delay_saved", "bytes_saved")
                for one in (result, there)
            ),
        ]
        for name in result["delay_s"]
    ]
    header = ["", "minutes", "with the paper's setting", "GB", "with that"]
    header += ["delay saved", "with that", "bytes saved", "with that"]
    return "\n".join(
        [
            "## SFT's plan",
            f"P1 chooses keep rate {p1['rho']:.3f}, {p1['levels']} levels and {p1['blocks']} "
            f"block of each device (`splitfrozen plan experiments/sft.toml`); the paper has "
            f"{paper['rho']:g}, {paper['levels']} and {paper['blocks']}. "
            f"{100 * p1['gap']:+.2f} % from brute force, the fit's mean squared error "
            f"{100 * p1['surface']['mse']:.2f} % (the paper: below 0.26 %); that is "
            f"{100 * p1['surface']['rmse']:.1f} points as a root and "
            f"{100 * p1['surface']['largest_residual']:.1f} at worst. At the paper's setting "
            f"accuracy is {there['accuracy']:.3f} by the fit, {there['measured_accuracy']:.3f} "
            f"measured, and {p1['surface']['reference']:.3f} without compression. "
            f"P2: Algorithm 3 is within {100 * p2['close']:g} % of the exact solution in "
            f"{100 * p2['within']:g} % of {p2['instances']} instances. What SFT saves against "
            "the others; the paper, against SFT without compression: "
            f"{_saved(paper['delay_saved'])} of the delay and {_saved(paper['bytes_saved'])} of "
            "the bytes. Where the paper's minutes and bytes "
            "differ: [planning.md](planning.md).",
            "",
            _table(header, lines),
            "",
        ]
    )


def planned_fedsllm(result: Result) -> str:
    lines = [
        [
            figure,
            *(_yes(holds) for holds in claims.values()),
            "-" if trend is None else trend["says"],
            *("-" if trend is None else _yes(trend[key]) for key in ("holds", "holds_as_part")),
        ]
        for figure, claims in result["claims"].items()
        for trend in [result["trends"].get(figure)]
    ]
    claimed, large = next(iter(result["claims"].values())), result["large"]
    return "\n".join(
        [
            "## FedsLLM's plan",
            f"Delay saved against baseline a: {_saved(result['delay_saved'])}, from "
            f"{_saved(result['delay_saved_low'])} to {_saved(result['delay_saved_high'])} (10th to "
            f"90th percentile of {result['cells']} cells; the paper: about "
            f"{_saved(result['paper_delay_saved'])}; `splitfrozen plan experiments/fedsllm.toml`). "
            f"With E(r) of easier targets: {_shares(result['delay_saved_by_target'])}. "
            f"Power: bisection and convex programme differ by {result['power_gap']:.1e} at most. "
            f"The descent is {100 * result['descent_gap_mean']:.2f} % from the optimum on "
            f"average, {100 * result['descent_gap_max']:.2f} % at worst. {large['clients']} "
            f"clients and {large['subchannels']} subchannels take {large['cpu_s']:.2f} s of CPU. "
            "Whether the figures are as the paper says of its own:",
            "",
            _table(["figure", *claimed, "gap", "in seconds", "as a part"], lines),
            "",
            "![Delay over bandwidth, speeds and power](../benchmarks/results/fedsllm/fedsllm.png)",
            "",
        ]
    )


def network(result: Result) -> str:
    lines = [
        [name, *(f"{row[f'accuracy_{when}']:.3f}" for when in ("before", "after"))]
        for name, row in result["rows"].items()
    ]
    return "\n".join(
        [
            "## MRPC over the network",
            "Ten device processes and a server over HTTPS on one machine (`benchmarks/mrpc.py`);",
            "MiniLM, cut 2, depths 1 and 2, "
            f"learning rate {result['lr']:g}, seed {result['seed']}.",
            "",
            _table(["partition", "accuracy before", "after"], lines),
            "",
        ]
    )


def front(result: Result) -> str:
    setting = result["setting"]
    lines = [
        [name, f"{row['ms']:.0f}", f"{row['times_as_fast']:.1f}"]
        for name, row in result["rows"].items()
    ]
    return "\n".join(
        [
            "## The front on a device",
            f"{setting['depth']} blocks of GPT-2 small's shape on {setting['batch']} x "
            f"{setting['tokens']} tokens, {setting['threads']} thread (`benchmarks/front.py`).",
            "",
            _table(["front", "ms", "times as fast as torch eager"], lines),
            "",
        ]
    )


def table2(result: Result) -> str:
    lines = [
        [
            row["dataset"],
            str(row["rank"]),
            row["method"],
            *(
                f"{row[column]:.1f} ({row['paper'][column]:g})"
                for column in ("device_tflop", "device_s", "total_s")
            ),
        ]
        for row in result["rows"]
    ]
    gained = {
        "simulated, one epoch": result["reductions"],
        "the paper's table, averaged in the same way": result["paper_reductions"],
        **{
            f"simulated, {result['reuse']['epochs']} epochs, reuse = {reuse}": result["reuse"][
                "reductions"
            ][reuse]
            for reuse in ("never", "once")
        },
    }
    shares = [
        [name, *(f"{100 * one[key]:.1f} %" for key in ("device_flop", "device_time", "total_time"))]
        for name, one in gained.items()
    ]
    return "\n".join(
        [
            "## Table II, simulated",
            "`splitfrozen simulate experiments/table2.toml --out benchmarks/results/table2`; the",
            "paper's figures in brackets. What the columns mean, and why the seconds differ, is in",
            "[simulation.md](simulation.md).",
            "",
            _table(["data", "rank", "method", "device TFLOP", "device s", "total s"], lines),
            "",
            "SplitFrozen takes less than the mean of FedLoRA and SplitLoRA by:",
            "",
            _table(["", "device FLOP", "device time", "total time"], shares),
            "",
            "![Six steps, unequal depths](../benchmarks/results/table2/gantt-unequal.png)",
            "",
        ]
    )


def replayed(result: Result) -> str:
    lines = []
    for run in result["runs"]:
        real, again, forecast = (run[name] for name in ("measured", "replayed", "forecast"))
        lines.append(
            [
                *(f"{one['makespan_s']:.1f}" for one in (real, again)),
                f"{100 * run['difference']['makespan']:+.1f} %",
                f"{100 * run['difference']['bytes']:+.2f} %",
                f"{forecast['makespan_s']:.1f}",
            ]
        )
    header = ["measured s", "replayed s", "makespan", "bytes", "forecast s"]
    return "\n".join(
        [
            "## A network run, replayed",
            "The demo's event log, its measured times taken away, replayed with one measured speed",
            "for each party and phase (`benchmarks/replay.py`).",
            "",
            _table(header, lines),
            "",
        ]
    )


def replanned(result: Result) -> str:
    lines = [
        [
            *(" and ".join(map(str, row[when].values())) for when in ("before", "after")),
            *(f"{row[name]:.1f}" for name in ("noticed", "said", "seconds")),
            f"{row['ratio']:.2f}",
        ]
        for row in result["runs"]
    ]
    header = ["depths", "then", "planned anew after s", "said s", "took s", "ratio"]
    return "\n".join(
        [
            "## A device becomes five times slower",
            "Half-way through a network run of two devices (`benchmarks/replan.py`): the first",
            "plan with other depths, and what it took. The median may be "
            f"{result['allowed']:g} and is {result['ratio']:.2f}.",
            "",
            _table(header, lines),
            "",
        ]
    )


def simulator(result: Result) -> str:
    lines = [
        [
            f"{row['devices']:,} x {row['steps']:,}",
            row["links"],
            f"{row['events']:,}",
            f"{row['seconds']:.2f}",
            f"{row['cpu_us_per_event']:.1f}",
            str(row["peak_mib"]),
        ]
        for row in result["rows"]
    ]
    header = ["devices x steps", "links", "events", "seconds", "CPU µs an event", "peak MiB"]
    return "\n".join(
        ["## The simulator", "`benchmarks/simulator.py`.", "", _table(header, lines), ""]
    )


def memory(result: Result) -> str:
    lines = [
        [
            row["model"],
            row["front"],
            str(row["depth"]),
            *(f"{row[key] / 1e6:.0f}" for key in ("measured_bytes", "predicted_bytes")),
            f"{100 * row['off']:+.1f} %",
        ]
        for row in result["rows"]
    ]
    header = ["model", "front", "depth", "measured MB", "predicted MB", "off"]
    return "\n".join(
        [
            "## Memory of a device",
            "Peak of a real device process, and `model.costs` (`benchmarks/memory.py`).",
            "",
            _table(header, lines),
            "",
        ]
    )


SECTIONS: Mapping[str, Callable[[Result], str]] = {
    "accuracy": accuracy,
    "figure3": figure3,
    "table3": table3,
    "compression": compression,
    "codec": codecs,
    "transforms": transforms,
    "dither": dither,
    "perplexity": perplexity,
    "table2": table2,
    "splitfrozen-plan": planned,
    "sft": planned_sft,
    "fedsllm": planned_fedsllm,
    "replay": replayed,
    "replan": replanned,
    "simulator": simulator,
    "mrpc": network,
    "front": front,
    "memory": memory,
}
PLOTTED: Mapping[str, Callable[[Result, Path], None]] = {
    "accuracy": plots.draw,
    "figure3": plots.draw,
    "compression": plots.draw_tradeoff,
}


def _tables(result: Result) -> list[str]:
    parts = []
    for dataset in dict.fromkeys(row["dataset"] for row in result["rows"]):
        majority = result["majority"].get(dataset)
        beside = "" if majority is None else f"; the majority class has {100 * majority:.1f}"
        parts.append(f"### {dataset}")
        for measure, told in measures(result["rows"]).items():
            own = scores(result["rows"], dataset, result["labels"], measure)
            parts += [f"{told.capitalize()}{beside}.", "", _table(*own), ""]
    return parts


def _gains(result: Result) -> list[str]:
    """SplitFrozen beside the others, by data set and partition."""
    each = result["gains"]["each"]
    lines = []
    for place in dict.fromkeys((one["dataset"], one["partition"]) for one in each):
        own = [one for one in each if (one["dataset"], one["partition"]) == place]
        values = [[one[name] for one in own] for name in GAINS]
        lines.append(
            [*place, *(_signed(None if None in found else fmean(found)) for found in values)]
        )
    header = ["data set", "partition", "over FedLoRA and SplitLoRA, %", "over SplitLoRA, %"]
    return [_table([*header, "to centralised, points", "to IID, points"], lines)]


def _tried(result: Result) -> list[str]:
    """Which rates were tried, and how each did on the held-out training rows."""
    lines = [
        [
            one["dataset"],
            one["partition"],
            result["labels"][one["method"]],
            "-" if one["lr"] is None else f"{one['lr']:g}",
            ", ".join(f"{each['lr']:g}: {_score(each['score'])}" for each in one["tried"]),
        ]
        for one in result["tried"]
        if one["tried"]
    ]
    if not lines:
        return []
    header = ["data set", "partition", "method", "chosen", "tried: score on held-out rows"]
    return ["### Learning rates", _table(header, lines), ""]


def _seeds(losses: Sequence[float]) -> str:
    return " and ".join(f"{100 * one:.1f}" for one in losses)


def _score(score: float | None) -> str:
    return "diverged" if score is None else f"{score:.3f}"


def _made_on(result: Result) -> str:
    found, codes = result["environment"], result.get("codes", ())
    several = (
        f"Trained with {len(codes)} versions of the code; each file in `benchmarks/results/cells` "
        "names its own. "
    )
    return (
        f"{several if len(codes) > 1 else ''}On {found['cores']} cores of {found['processor']}, "
        f"Python {found['python']}, torch {found['torch']}, transformers {found['transformers']}, "
        f"peft {found['peft']}, ONNX Runtime {found['onnxruntime']}; commit {found['commit']}.\n"
    )


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _plain(text: str) -> str:
    """One line, in which nothing is taken for a mark of the document."""
    line = " ".join(text.split())
    return "".join(
        f"\\{character}" if character in "|<>*_`#[]$" else character for character in line
    )


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _saved(part: float | None) -> str:
    """A saving, as a part of what there was; nobody thinks of minus 2,400 percent."""
    if part is None:
        return "-"
    return f"{1 - part:.1f} times as much" if part < -1 else f"{100 * part:.1f} %"


def _shares(found: Mapping[str, float]) -> str:
    told = (f"{_saved(saved)} at {float(way):g} of the way" for way, saved in found.items())
    return ", ".join(told) or "not measured"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+z.1f}"


if __name__ == "__main__":
    main()
