"""Rows and prompts of another form than the training rows: said once, with the remedy, by every way in."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest

from prefmix.data.tokenization import tokenize_rows
from prefmix.evaluation.evaluator import evaluate
from prefmix.experiments.diagnose import diagnose_policy
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.policy.row_form import RowForm

PLAIN = [
    {"prompt": "What color is the sky?", "chosen": " Blue.", "rejected": " Green.", "user": user}
    for user in ("anna", "anna", "bob", "bob")
]


def said(row):
    roles = (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
    return {"user": row["user"]} | {name: [{"role": role, "content": row[name]}] for name, role in roles}


MESSAGES = [said(row) for row in PLAIN]


@pytest.fixture
def trained_on(make_policy, tiny_chat_tokenizer):
    """A policy whose training rows were of the given form."""

    def build(form):
        policy = make_policy(tokenizer=tiny_chat_tokenizer)
        config = replace(policy.config, row_form=form)
        return MixturePolicy(policy.model, tiny_chat_tokenizer, config, policy.users)

    return build


WAYS = {
    "score": lambda policy, rows: policy.score(rows),
    "adapt": lambda policy, rows: policy.adapt("carol", rows),
    "evaluate": lambda policy, rows: evaluate(policy, rows),
    "diagnose": lambda policy, rows: diagnose_policy(policy, rows, "it", cache=None),
    "generate": lambda policy, rows: policy.generate(rows[0]["prompt"], max_new_tokens=1),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_other_form_is_a_warning_and_the_same_one_is_none(trained_on, way):
    remedies = {"conversational": '"role": "user", "content": PROMPT', "standard": "plain text"}
    for form, same, other in (("conversational", MESSAGES, PLAIN), ("standard", PLAIN, MESSAGES)):
        policy = trained_on(form)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            WAYS[way](policy, same)
            WAYS[way](trained_on(None), other)  # older policies do not know
        with pytest.warns(UserWarning, match="but training rows were") as caught:
            WAYS[way](policy, other)
            WAYS[way](policy, other)
        messages = [str(warning.message) for warning in caught if "training rows were" in str(warning.message)]
        assert len(messages) == 1, "said once a policy"
        assert remedies[form] in messages[0]


def test_text_that_a_template_made_is_no_plain_prompt(trained_on, tiny_chat_tokenizer):
    rendered = tiny_chat_tokenizer.apply_chat_template(MESSAGES[0]["prompt"], tokenize=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trained_on("conversational").generate(rendered, max_new_tokens=1)


def test_rows_of_token_ids_have_neither_form(tiny_chat_tokenizer):
    ids = [{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}]
    table = tokenize_rows(ids, tiny_chat_tokenizer, progress=False)
    assert table.form == "tokenized" and table.select(table.weight > 0).form == "tokenized"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        RowForm("standard").check_rows(table.form)
        RowForm("tokenized").check_rows("standard")
