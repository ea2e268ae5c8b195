"""Draws the training curve and the score: ``python -m examples.tiny.draw`` (needs matplotlib)."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt

from examples.tiny.score import EACH_FAMILY

RESULTS = Path(__file__).parent / "results"
STORED = "stored, float32"


def main(folder: Path = RESULTS) -> None:
    """Writes training.png beside the JSON files it is drawn from."""
    curve = json.loads((folder / "curve.json").read_text())["curve"]
    found = json.loads((folder / "score.json").read_text())["scores"][STORED]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")

    minutes = [point["seconds"] / 60 for point in curve]
    left.plot(minutes, [point["loss"] for point in curve], color="tab:blue", label="loss")
    left.set(xlabel="minutes on two cores", ylabel="loss", yscale="log", title="Training")
    shares = left.twinx()
    accuracy = [point["token_accuracy"] for point in curve]
    shares.plot(minutes, accuracy, color="tab:orange", label="tokens right, weighted as the loss")
    shares.set_ylim(0, 1)
    left.figure.legend(loc="upper left", bbox_to_anchor=(0.12, 0.66))

    families = sorted(found["families"].items(), key=lambda item: item[1])
    middle.barh([name for name, _ in families], [share for _, share in families])
    middle.axvline(EACH_FAMILY, color="black", linewidth=0.8)
    middle.set_xlim(0.8, 1)
    middle.set_xticks([0.8, 0.85, 0.9, 0.95, 1.0])
    middle.set_title(f"Exact answers, held out: {found['overall']:.1%} of {found['asked']}")

    loads = found["expert_loads"]
    image = right.imshow(loads, vmin=0, cmap="viridis")
    for layer, row in enumerate(loads):
        for expert, load in enumerate(row):
            right.text(expert, layer, f"{load:.0%}", ha="center", va="center", color="white")
    right.set(xlabel="expert", ylabel="layer", title="Share of each layer's assignments")
    right.set_yticks(range(len(loads)))
    figure.colorbar(image, ax=right, shrink=0.7)
    figure.savefig(folder / "training.png", dpi=110)


if __name__ == "__main__":
    main()
