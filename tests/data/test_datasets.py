"""Named sets: the shipped one against its published sizes, the others where PREFMIX_DATA has them."""

from __future__ import annotations

import hashlib
import io
import socket
import zipfile
from pathlib import Path

import pytest

from prefmix.data import datasets as named
from prefmix.data.convarg import convarg_sides, convarg_topics, load_convarg
from prefmix.data.readers import read_rows
from prefmix.data.validation import validate


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(named.urllib.request, "urlopen", refuse)
    monkeypatch.delenv("PREFMIX_DATA", raising=False)


def test_convarg_is_shipped_whole(no_network: None):
    rows = named.load_named("convarg")
    assert len(rows) == 62_328
    assert len({row["user"] for row in rows}) == 3_678
    assert len({row["prompt"] for row in rows}) == len(convarg_topics()) == 24
    assert not any("<br" in row["chosen"] for row in rows)
    assert any("\n" in row["chosen"] for row in rows)
    report = validate("convarg")
    assert report.dropped == {"tie": sum(row["tie"] for row in rows)}
    assert report.texts == 770


def test_convarg_says_whose_it_is():
    from importlib import resources

    text = resources.files("prefmix.data").joinpath("files", "convarg", "ATTRIBUTION.md").read_text("utf-8")
    for part in ("Habernal", "Gurevych", "CC-BY 4.0", "https://creativecommons.org/licenses/by/4.0/", "changed"):
        assert part in text


def test_convarg_filters():
    topic = "is-the-school-uniform-a-good-or-bad-idea-_good"
    rows = load_convarg(topics=[topic], min_judgements=5, max_words=60)
    assert {row["metadata"]["topic"] for row in rows} == {topic}
    assert all(len(row[side].split()) <= 60 for row in rows for side in ("chosen", "rejected"))
    decisive = [row["user"] for row in rows if not row["tie"]]
    assert min(decisive.count(user) for user in set(decisive)) >= 5
    assert {row["user"] for row in rows} == set(decisive)
    assert len({row["prompt"] for row in load_convarg(topics=["Is the school uniform"])}) == 2  # by title, both sides
    with pytest.raises(ValueError, match=r"no judgement is left with topics=\['cats'\].*topics are ban-plastic"):
        load_convarg(topics=["cats"])


def test_convarg_as_conversations_says_the_same():
    plain, chat = load_convarg(max_words=20), load_convarg(max_words=20, conversational=True)
    assert [row["prompt"].strip() for row in plain] == [row["prompt"][0]["content"] for row in chat]
    assert [row["chosen"] for row in plain] == [row["chosen"][0]["content"] for row in chat]
    assert {row["chosen"][0]["role"] for row in chat} == {"assistant"}


def test_debates_have_two_sides_that_the_prompt_does_not_name():
    sides = convarg_sides()
    assert len(sides) == 12
    for prompt, texts in sides.items():
        assert len(texts) == 2
        assert "Side" not in prompt


def test_splits_are_fixed_disjoint_and_complete():
    rows = named.load_named("convarg", max_words=30)
    parts = [named.load_named("convarg", max_words=30, split=split) for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(rows)
    assert [round(len(part) / len(rows), 1) for part in parts] == [0.7, 0.1, 0.2]
    assert parts[0] == named.load_named("convarg", max_words=30, split="train")


def test_a_named_set_is_a_source_of_rows(no_network: None):
    assert len(read_rows("convarg", split="test")) == len(named.load_named("convarg", split="test"))


def test_what_is_not_there_is_named_with_a_remedy(no_network: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(ValueError, match="'cats' is not known. Use one of convarg, jester"):
        named.load_named("cats")
    with pytest.raises(ValueError, match="split='dev' of 'convarg' is not known. Use one of train"):
        named.load_named("convarg", split="dev")
    with pytest.raises(
        ValueError, match=r"PREFMIX_DATA is not set. Set PREFMIX_DATA to a folder .*jester/ratings.jsonl"
    ):
        named.load_named("jester")
    monkeypatch.setenv("PREFMIX_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"which has no jester/ratings.jsonl.gz"):
        named.load_named("jester")


@pytest.mark.parametrize("name", ["jester", "movielens", "reviews", "hh"])
def test_named_sets_give_sound_rows(name: str, prefmix_data: Path):
    report = validate(named.load_named(name, split="test"))
    assert report.kept > 400
    assert (report.users > 30) == (name != "hh")
    assert ("user_age" in report.metadata_fields) == (name == "movielens")


def archive() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as files:
        genres = ["unknown", "Action", "Drama"]
        files.writestr("ml-100k/u.genre", "".join(f"{genre}|{i}\n" for i, genre in enumerate(genres)) + "\n")
        films = [("1", "Café (1995)", "0|1|0"), ("2", "Sea (1996)", "0|0|1"), ("3", "Sea (1996)", "0|0|1")]
        items = "".join(f"{i}|{title}|01-Jan-1995||http://x|{flags}\n" for i, title, flags in films)
        files.writestr("ml-100k/u.item", items.encode("latin-1"))
        files.writestr("ml-100k/u.user", "1|24|M|technician|85711\n")
        files.writestr("ml-100k/u.data", "1\t1\t5\t0\n1\t2\t1\t0\n1\t3\t4\t0\n")
    return packed.getvalue()


def test_movielens_is_fetched_once_and_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    data, asked = archive(), []
    monkeypatch.delenv("PREFMIX_DATA", raising=False)
    monkeypatch.setenv("PREFMIX_CACHE", str(tmp_path))
    monkeypatch.setattr(named.urllib.request, "urlopen", lambda url, timeout: asked.append(url) or io.BytesIO(data))
    with pytest.raises(ValueError, match="has another content than expected"):
        named.load_named("movielens")
    assert not list(tmp_path.rglob("*.zip"))
    monkeypatch.setattr(named, "MOVIELENS_MD5", hashlib.md5(data).hexdigest())
    asked.clear()
    assert named.load_named("movielens") == [
        {
            "prompt": "Recommend a film.\n",
            "chosen": "Café (1995): action",
            "rejected": "Sea (1996): drama",
            "user": "1",
            "metadata": {"user_age": 24, "user_sex": "M", "user_occupation": "technician"},
        }
    ]
    assert len(asked) == 1
