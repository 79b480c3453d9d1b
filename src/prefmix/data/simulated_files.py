"""A simulated data set on disk: rows that `validate` and `train` read, and the truth in a file that no fit reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefmix.data.simulation import Simulated
from prefmix.data.simulation_oracle import oracle


def write_simulated(folder: str | Path, simulated: Simulated, *, with_group: bool = False) -> dict[str, Any]:
    """Writes `train.jsonl`, `test.jsonl`, `new_users.jsonl` (where there are any), `truth.json`, and `features.json`.

    `features.json` maps every made-up text to its vector; real texts need none, and their attributes would tell.

    Args:
        folder: must not exist.
        simulated: the data set.
        with_group: also a `group` column in the rows.

    Returns:
        What `truth.json` holds: options, tastes, users' weights, and the oracle's figures of each split.

    Raises:
        ValueError: the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"output={str(folder)!r} exists and stays as it is; name a new folder")
    splits = [split for split, judged in simulated.judged.items() if len(judged.user)]
    found = {split: oracle(simulated, split) for split in splits if split != "train"}
    rules = {split: {rule: figures._asdict() for rule, figures in o._asdict().items()} for split, o in found.items()}
    truth = simulated.truth() | {"oracle": rules}
    folder.mkdir(parents=True)
    for split in splits:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in simulated.rows(split, with_group=with_group)]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "truth.json").write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")
    if simulated.pools["train"].rotated:
        pools = (simulated.pools["train"], simulated.pools["test"])
        vectors = {text: row for pool in pools for text, row in zip(pool.texts, pool.attributes.round(6).tolist())}
        (folder / "features.json").write_text(json.dumps(vectors) + "\n", encoding="utf-8")
    return truth
