"""Named public preference sets as rows. `convarg` is in the package; others are found or fetched.

Where they are looked for: the folder that the environment variable PREFMIX_DATA names, then the user's cache, then the
publisher (checked by hash), where the licence and a stable address allow it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from prefmix.data.cache_folder import cache_folder
from prefmix.data.convarg import load_convarg

Split = Literal["train", "validation", "test"]

PUBLISHERS = {
    "jester": "https://eigentaste.berkeley.edu/dataset/ (Goldberg et al. 2001)",
    "movielens": "https://files.grouplens.org/datasets/movielens/ml-100k.zip (GroupLens research terms)",
    "reviews": "https://ai.stanford.edu/~amaas/data/sentiment/ (Maas et al. 2011) and "
    "https://www.cs.jhu.edu/~mdredze/datasets/sentiment/ (Blitzer et al. 2007)",
    "hh": "https://huggingface.co/datasets/Anthropic/hh-rlhf (MIT)",
}
MOVIELENS_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
MOVIELENS_MD5 = "0e33842e24a9c977be4e0107933c0723"  # published beside the archive, in ml-100k.zip.md5
DOWNLOAD_TIMEOUT_S = 60
SPLIT_ENDS = {"train": 70, "validation": 80, "test": 100}  # percent of the rows, in this order


def load_named(name: str, *, split: str | None = None, **options: Any) -> list[dict[str, Any]]:
    """Rows of a public set.

    Args:
        name: `convarg` (arguments; 3,678 judges; shipped), `jester` (jokes; 4,000 raters), `movielens` (films; raters
            with age, sex and occupation), `reviews` (planted groups of review readers), `hh` (Anthropic's harmless-base
            test pairs, nobody named).
        split: None for all rows; `train`, `validation` or `test` for a fixed 70%, 10% or 20% of them by a hash of
            their position, so that people stand in all three. `reviews` has splits of its own, with disjoint texts.
        options: the set's own: `load_convarg`, `load_jester`, `load_movielens`, `planted_tasks.review_groups`.

    Raises:
        ValueError: an unknown name or split, or a set that cannot be found, with what to do.
    """
    if name not in NAMED_SETS:
        raise ValueError(f"data set {name!r} is not known. Use one of {', '.join(NAMED_SETS)}.")
    if split is not None and split not in SPLIT_ENDS:
        raise ValueError(f"split={split!r} of {name!r} is not known. Use one of {', '.join(SPLIT_ENDS)}.")
    if name == "reviews":
        return _load_reviews(split, **options)
    rows = NAMED_SETS[name](**options)
    return rows if split is None else list(_split_rows(name, rows, split))


def _split_rows(name: str, rows: list[dict[str, Any]], split: str) -> Iterator[dict[str, Any]]:
    names = list(SPLIT_ENDS)
    start = 0 if split == names[0] else SPLIT_ENDS[names[names.index(split) - 1]]
    for index, row in enumerate(rows):
        if start <= zlib.crc32(f"{name}:{index}".encode()) % 100 < SPLIT_ENDS[split]:
            yield row


def load_jester(*, pairs_per_user: int = 30, min_gap: float = 4.0, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of jokes that one person rated at least `min_gap` apart, on a scale from -10 to 10."""
    from prefmix.data.ratings import rating_pairs

    return rating_pairs(
        ((row["user"], row["joke"], row["rating"]) for row in read_named_file("jester", "ratings")),
        {row["id"]: row["text"] for row in read_named_file("jester", "jokes")},
        prompt="Tell me a joke.\n",
        pairs_per_user=pairs_per_user,
        min_gap=min_gap,
        seed=seed,
    )


def load_movielens(*, pairs_per_user: int = 30, min_gap: float = 2.0, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of films that one person rated at least `min_gap` stars apart.

    Metadata: `user_age`, `user_sex`, `user_occupation`.
    """
    from prefmix.data.ratings import rating_pairs

    films = read_named_file("movielens", "movies")
    people = read_named_file("movielens", "users")
    return rating_pairs(
        ((row["user"], row["movie"], row["rating"]) for row in read_named_file("movielens", "ratings")),
        {film["title"]: f"{film['title']}: {', '.join(film['genres']).lower()}" for film in films},
        prompt="Recommend a film.\n",
        pairs_per_user=pairs_per_user,
        min_gap=min_gap,
        seed=seed,
        metadata={
            person["user"]: {f"user_{field}": person[field] for field in ("age", "sex", "occupation")}
            for person in people
        },
    )


def load_hh() -> list[dict[str, Any]]:
    """Anthropic's harmless-base test pairs: whole dialogues, prompt implicit, nobody named."""
    return [
        {"chosen": row["chosen"], "rejected": row["rejected"], "tie": row["chosen"] == row["rejected"]}
        for row in read_named_file("hh", "harmless_base_test")
    ]


def _load_reviews(split: str | None, **options: Any) -> list[dict[str, Any]]:
    from prefmix.data.planted_tasks import review_groups

    splits = review_groups(**options)
    if split is None:
        return splits.train + splits.validation + splits.test
    return splits._asdict()[split]


NAMED_SETS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "convarg": load_convarg,
    "jester": load_jester,
    "movielens": load_movielens,
    "reviews": lambda **options: _load_reviews(None, **options),
    "hh": load_hh,
}


def read_named_file(name: str, file: str) -> list[dict[str, Any]]:
    """The records of `<PREFMIX_DATA>/<name>/<file>.jsonl.gz`, or the same made from the publisher's own file.

    Raises:
        ValueError: where it can be neither found nor fetched.
    """
    folder = os.environ.get("PREFMIX_DATA")
    path = Path(folder) / name / f"{file}.jsonl.gz" if folder else None
    if path is not None and path.is_file():
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    if name == "movielens":
        return _movielens_records(file)
    if name == "hh":
        return _hub_records("Anthropic/hh-rlhf", data_dir="harmless-base", split="test")
    looked = f"PREFMIX_DATA is {folder}, which has no {name}/{file}.jsonl.gz" if folder else "PREFMIX_DATA is not set"
    raise ValueError(
        f"data set {name!r} is not here: {looked}. Set PREFMIX_DATA to a folder that holds {name}/{file}.jsonl.gz, "
        f"made from {PUBLISHERS[name]}, or use 'convarg', which the package ships."
    )


def _hub_records(repository: str, **options: Any) -> list[dict[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(repository, **options).to_list()
    except Exception as error:  # the hub's client raises many kinds; all of them mean that it is not to be had
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"data set {repository!r} did not come from the hub ({reason}). Check the network and HF_HUB_OFFLINE, or "
            "set PREFMIX_DATA to a folder that holds it."
        ) from None


def _movielens_records(file: str) -> list[dict[str, Any]]:
    """ML-100K as the publisher packs it, in the form of our files: ratings by title, one title for each film."""
    archive = zipfile.ZipFile(io.BytesIO(_download(MOVIELENS_URL, MOVIELENS_MD5)))

    def table(name: str, separator: str) -> list[list[str]]:
        text = archive.read(f"ml-100k/{name}").decode("latin-1")
        return [line.split(separator) for line in text.splitlines() if line]

    if file == "users":
        return [
            {"user": user, "age": int(age), "sex": sex, "occupation": occupation}
            for user, age, sex, occupation, _ in table("u.user", "|")
        ]
    films = {item[0]: item for item in table("u.item", "|")}
    if file == "ratings":
        # A few films stand twice under one title; the first rating of a person counts.
        rated: dict[tuple[str, str], int] = {}
        for user, item, rating, _ in table("u.data", "\t"):
            rated.setdefault((user, films[item][1]), int(rating))
        return [{"user": user, "movie": title, "rating": rating} for (user, title), rating in rated.items()]
    genres = [name for name, _ in table("u.genre", "|")]
    return [
        {"title": item[1], "genres": [genre for genre, flag in zip(genres, item[5:], strict=True) if flag == "1"]}
        for item in films.values()
    ]


def _download(url: str, md5: str) -> bytes:
    """The file behind `url`, from the cache where it is there already; never one with another hash."""
    kept = cache_folder() / "datasets" / url.rsplit("/", 1)[-1]
    if kept.is_file() and hashlib.md5(kept.read_bytes()).hexdigest() == md5:
        return kept.read_bytes()
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as answer:
            data: bytes = answer.read()
    except OSError as error:
        raise ValueError(
            f"{url} could not be fetched ({error}). Check the network, or set PREFMIX_DATA to a folder that holds it."
        ) from None
    if hashlib.md5(data).hexdigest() != md5:
        raise ValueError(f"{url} has another content than expected (md5 {md5}). Try again; if it stays so, report it.")
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_name(f"{kept.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    partial.replace(kept)
    return data
