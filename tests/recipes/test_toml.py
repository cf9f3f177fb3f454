"""A recipe's file: every key is checked, what is wrong is one line that names it, and examples are files that work."""

import pytest

from freehold.errors import BadInput
from freehold.recipes.pretrain import PretrainSettings, presets
from freehold.recipes.sft import SftSettings
from freehold.recipes.toml import read_settings, write_example, write_settings

LEAST = 'out = "./run"\nmodel = "m"\n[data]\ntrain = ["./chats"]\n'

WRONG = {
    "learning_rate = 1.0": ("`learning_rate` is no key", None),
    "sede = 1": ("`sede` is no key", "`seed`"),
    "seed = -1": ("`seed` is -1, wanted 0 or more", None),
    "seed = 1.5": ("`seed` is 1.5, wanted a whole number", None),
    "seed = true": ("`seed` is True, wanted a whole number", None),
    "save_every = 0": ("`save_every` is 0, wanted 1 or more", None),
    'dtype = "float16"': ("`dtype` is 'float16', wanted one of float32, bfloat16", None),
    "data.budget = 1": ("`data.budget` is no key", "`data.budget_tokens`"),
    "data.train = 5": ("`data.train` is 5, wanted a list of a path", None),
    "data.train = []": ("`data.train` names no data set", None),
    "data.weights = [1, 2]": ("`data.weights` has 2 entries for 1 data sets", None),
    "data.tokens_per_step = 3000": ("`data.tokens_per_step` is 3,000, which is no multiple", None),
    "data.sequence_tokens = 4096": ("`data.sequence_tokens` is 4,096, more than `data.budget_tokens`", None),
    "optimizer.betas = [0.9]": ("`optimizer.betas` is [0.9], wanted a list of 2 numbers", None),
    "optimizer.betas = [0.9, 1.0]": ("`optimizer.betas` is [0.9, 1.0], wanted less than 1", None),
    "optimizer.eps = nan": ("`optimizer.eps` is nan", None),
    "optimizer.eps = inf": ("`optimizer.eps` is inf, wanted a number with an end", None),
    "optimizer.momentum = 1": ("`optimizer.momentum` is 1.0, wanted less than 1", None),
    "objective.max_gradient_norm = 0": ("`objective.max_gradient_norm` is 0", "1e9"),
    f"seed = {10**20}": (f"`seed` is {10**20}, wanted 9223372036854775807 or less", None),
    f"save_every = {'9' * 400}": ("`save_every` is 9999", None),
    f"seed = {'9' * 5000}": ("`seed` is '9999", None),
    "threads = 100000": ("`threads` is 100000, wanted 4096 or less", None),
    "optimizer = 3": ("`optimizer` is 3, wanted a table", None),
    "schedule.warmup = 500": ("a schedule of 200 is too short for 500 of warm-up", None),
    "schedule.total = 0": ("`schedule.total` is 0", None),
    "schedule.peak = 1e-7": ("`schedule.end` is 1e-06, more than `schedule.peak`, 1e-07", "lower end"),
    "out.there = 1": ("`out.there`: `out` is no table", None),
    "seed": ("'seed' changes nothing", "--set schedule.total=100"),
}


@pytest.mark.parametrize(("change", "told"), WRONG.items(), ids=WRONG)
def test_what_is_wrong_is_one_line_that_names_the_key(change, told):
    message, hint = told
    with pytest.raises(BadInput) as error:
        read_settings(LEAST, SftSettings, changes=[change])
    assert error.value.message.startswith(message)
    assert "\n" not in error.value.message
    assert hint is None or hint in (error.value.hint or "")


@pytest.mark.parametrize("divided", ["weights='shard'", "tensor=2"])
def test_muon_is_refused_where_a_process_has_parts_of_matrices(divided):
    with pytest.raises(BadInput, match="moves whole matrices"):
        read_settings(LEAST, SftSettings, changes=["optimizer.matrices=muon", f"parallel.{divided}"])


def test_a_date_in_a_models_config_is_refused():
    model = LEAST.replace('model = "m"', 'tokenizer = "t"') + '[model]\nmodel_type = "llama"\nborn = 1979-05-27\n'
    with pytest.raises(BadInput, match="wanted a path or a table without dates"):
        read_settings(model, PretrainSettings)


def test_a_number_without_end_is_no_toml():
    with pytest.raises(BadInput, match="the file is no TOML"):
        read_settings(f"seed = {'9' * 5000}", SftSettings)


def test_a_key_that_has_no_default_is_asked_for_with_what_it_means():
    with pytest.raises(BadInput, match="`data` is missing"):
        read_settings('out = "./run"\nmodel = "m"\n', SftSettings)
    with pytest.raises(BadInput, match=r"`data\.train` is missing"):
        read_settings('out = "./run"\nmodel = "m"\n[data]\n', SftSettings)


def test_a_file_that_is_no_toml_is_one_line():
    with pytest.raises(BadInput, match="the file is no TOML"):
        read_settings("out = ", SftSettings)


def test_changes_come_after_the_file_and_need_no_quotes():
    changes = ["data.budget_tokens=4096", "out=./other", "schedule.peak=1", "data.train=['a', 'b']"]
    settings = read_settings(LEAST, SftSettings, changes=changes)
    assert settings.data.budget_tokens == 4096
    assert str(settings.out) == "other"
    assert settings.schedule.peak == 1.0
    assert [str(path) for path in settings.data.train] == ["a", "b"]


def test_a_length_alone_keeps_the_shape_of_the_schedule():
    schedule = read_settings(LEAST, SftSettings, changes=["schedule.total=20"]).schedule
    assert (schedule.warmup, schedule.decay, schedule.total) == (1, 19, 20)


@pytest.mark.parametrize("kind", [SftSettings, PretrainSettings])
def test_an_example_is_a_file_that_explains_every_key_and_is_read_as_what_it_says(kind):
    text = write_example(kind)
    settings = read_settings(text, kind)
    assert write_settings(settings) == text
    assert text.count("\n# ") > 15
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", presets())
def test_a_preset_written_as_a_file_is_the_preset(name):
    assert read_settings(write_settings(presets()[name]), PretrainSettings) == presets()[name]


def test_the_preset_of_nano_has_the_published_numbers():
    nano = presets()["nemotron-3-nano"]
    tokens_per_step = 3072 * 8192
    assert nano.data.tokens_per_step == tokens_per_step
    assert (nano.optimizer.betas, nano.optimizer.weight_decay) == ((0.9, 0.95), 0.1)
    assert (nano.schedule.peak, nano.schedule.end) == (1e-3, 1e-5)
    assert nano.schedule.total * tokens_per_step == pytest.approx(25e12, rel=1e-5)
    assert nano.schedule.warmup * tokens_per_step == pytest.approx(8.4e9, rel=0.01)
    assert nano.schedule.decay / nano.schedule.total == pytest.approx(0.2, rel=1e-5)
    assert (nano.objective.correction_rate, nano.objective.balance_weight) == (1e-3, 1e-4)
