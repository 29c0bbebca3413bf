"""Which videos a search may see, what it proposes, and how that is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from sora.cli.failures import run_verb
from sora.config import Project
from sora.core.errors import InputError, RunActive
from sora.core.trials import Trial
from sora.dataset import splits
from sora.learning import tuning
from tests.searches import Trained


def never(fold: int, mean: float) -> bool:
    return False


def trial(project: Project, plan: tuning.Plan, number: int, **values: float) -> Trial:
    named = {f"train.{name}": value for name, value in values.items()}
    means = tuning.judge(project, plan, named, never)
    return Trial(number, "complete", named, means, baseline=not values)


def test_no_test_video_is_in_any_fold(split_project: Project, made_up: Trained) -> None:
    ledger = splits.read(split_project.splits_file)
    test = set(ledger.loc[ledger["split"] == "test", "sha256"])
    inner = set(ledger.loc[ledger["split"] != "test", "sha256"])
    assert len(test) >= 8 and len(inner) >= 24
    plan = tuning.plan(split_project, folds=3)
    trial(split_project, plan, 0)
    trial(split_project, plan, 1, learning_rate=0.003)
    assert len(made_up.tables) == 6
    for table in (*plan.folds, *made_up.tables):
        assert set(table["sha256"]) == inner and set(table["split"]) == {"train", "val", "test"}
    judged = pd.concat([table[table["split"] == "test"] for table in plan.folds])
    assert sorted(judged["sha256"]) == sorted(inner)  # each once
    for table in plan.folds:
        camera = table["path"].str.extract(r"(g\d+)_")[0]
        assert table.groupby(camera)["split"].nunique().max() == 1
    assert set(plan.units) == inner


def test_videos_without_a_split_are_left_out(split_project: Project, made_up: Trained) -> None:
    ledger = splits.read(split_project.splits_file)
    dropped = set(ledger.loc[ledger["split"] == "train", "sha256"].head(3))
    ledger[~ledger["sha256"].isin(dropped)].to_csv(split_project.splits_file, index=False)
    assert not dropped & set(tuning.plan(split_project).units)


def test_a_trial_that_is_given_up_trains_no_more_folds(split_project: Project, made_up: Trained) -> None:
    plan = tuning.plan(split_project, folds=4)
    means = tuning.judge(split_project, plan, {}, lambda fold, mean: fold == 1)
    assert len(means) == 2 == len(made_up.tables)
    assert len(tuning.judge(split_project, plan, {}, never)) == 4 == len(made_up.tables)  # the first two are kept


def test_the_name_of_a_study_follows_from_what_decides_it(split_project: Project) -> None:
    names = {
        tuning.plan(split_project).study,
        tuning.plan(split_project, folds=4).study,
        tuning.plan(split_project, metric="accuracy").study,
        tuning.plan(split_project, only=["train.crop"]).study,
        tuning.plan(split_project, search="other").study,
    }
    assert len(names) == 5 and tuning.plan(split_project).study in names
    text = split_project.params_file.read_text()
    split_project.params_file.write_text(text + "serve: {port: 9999}\n")
    assert tuning.plan(split_project).study in names
    split_project.params_file.write_text(text + "clip: {frames: 8}\n")
    assert tuning.plan(split_project).study not in names


def test_a_clear_gain_is_proposed_and_written_with_comments(split_project: Project, made_up: Trained) -> None:
    plan = tuning.plan(split_project, only=["train.learning_rate"])
    before = split_project.params_file.read_text()
    trials = [trial(split_project, plan, 0), trial(split_project, plan, 1, learning_rate=0.006)]
    best, baseline, proposal = tuning.propose(split_project, plan, trials)
    assert (best, baseline) == (trials[1], trials[0]) and proposal.changes == {"train.learning_rate": 0.006}
    assert proposal.low is not None and proposal.gain is not None and 0 < proposal.low < proposal.gain
    assert "-  learning_rate: 0.001\n+  learning_rate: 0.006\n" in proposal.diff
    assert split_project.params_file.read_text() == before
    assert tuning.apply(split_project, plan, proposal)
    assert split_project.params_file.read_text() == before.replace("learning_rate: 0.001", "learning_rate: 0.006")
    assert split_project.params_file.read_text().startswith("# mine\n")


def test_no_clear_gain_proposes_nothing(split_project: Project, made_up: Trained) -> None:
    plan = tuning.plan(split_project, metric="accuracy")
    first = trial(split_project, plan, 0)
    _, _, proposal = tuning.propose(split_project, plan, [first, trial(split_project, plan, 1, learning_rate=0.00101)])
    assert proposal.changes == {} and proposal.diff == "" and proposal.words.startswith("nothing is proposed")
    assert not tuning.apply(split_project, plan, proposal)
    _, _, proposal = tuning.propose(split_project, plan, [])
    assert "have not been judged" in proposal.words
    worse = trial(split_project, plan, 1, learning_rate=0.0002)
    best, _, proposal = tuning.propose(split_project, plan, [first, worse])
    assert best == first and "no trial was better" in proposal.words


def test_more_trials_need_a_larger_gain(split_project: Project, made_up: Trained) -> None:
    plan = tuning.plan(split_project)
    trials = [trial(split_project, plan, 0), trial(split_project, plan, 1, learning_rate=0.0011)]
    few = tuning.propose(split_project, plan, trials)[2]
    others = [replace(trials[1], number=n, state="pruned", folds=(9.0,)) for n in range(2, 40)]
    many = tuning.propose(split_project, plan, [*trials, *others])[2]
    assert few.low is not None and many.low is not None
    assert many.low < few.low and (few.compared, many.compared) == (1, 39)


def test_params_that_changed_meanwhile_are_not_overwritten(split_project: Project, made_up: Trained) -> None:
    plan = tuning.plan(split_project)
    _, _, proposal = tuning.propose(
        split_project, plan, [trial(split_project, plan, 0), trial(split_project, plan, 1, learning_rate=0.006)]
    )
    text = split_project.params_file.read_text().replace("0.001", "0.002")
    split_project.params_file.write_text(text)
    with pytest.raises(InputError, match="changed while"):
        tuning.apply(split_project, plan, proposal)
    assert split_project.params_file.read_text() == text


def test_one_search_at_a_time(split_project: Project) -> None:
    with (
        tuning.alone(split_project),
        pytest.raises(RunActive, match="another `sora tune`"),
        tuning.alone(split_project),
    ):
        pass


@pytest.mark.parametrize("missing", ["manifest", "splits_file", "shards"])
def test_nothing_prepared_says_sora_run(
    split_project: Project, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place: Path = getattr(split_project, missing)
    place.rename(place.with_name("elsewhere"))
    assert run_verb(["tune", "--project", str(split_project.root), "--json"]) == 2
    out, err = capsys.readouterr()
    assert not out and "nothing is prepared" in err and "fix: `sora run`" in err


def test_wrong_use(split_project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(split_project.root)
    assert run_verb(["tune", "--only", "train.batch", "--project", root]) == 2
    assert "train.batch" in capsys.readouterr().err
    assert run_verb(["tune", "--minutes", "0", "--project", root]) == 2
    assert run_verb(["tune", "--folds", "18", "--project", root]) == 2
    assert "groups" in capsys.readouterr().err
