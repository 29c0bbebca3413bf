"""A project: a folder with params.yaml, and the place of everything that Sora reads or writes below it.

Nobody else builds such a path. A server alone decides what it keeps in its own folder besides its database.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sora.config.settings import Settings, parse
from sora.core.errors import SettingsError


@dataclass(frozen=True, slots=True)
class CacheFolder:
    """Files of registered models, so that a server starts without its registry. Several servers may share one."""

    root: Path

    @property
    def models(self) -> Path:
        """`<digest>/{model.keras, recipe.json}` for each model."""
        return self.root / "models"

    @property
    def champion(self) -> Path:
        """Which model was served last (JSON)."""
        return self.root / "champion.json"


@dataclass(frozen=True, slots=True)
class Project:
    """A folder with params.yaml. All paths that Sora reads or writes start here."""

    root: Path

    # --- versioned by git or DVC -------------------------------------------------------------------------------------

    @property
    def params_file(self) -> Path:
        return self.root / "params.yaml"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def data_dvc(self) -> Path:
        return self.root / "data.dvc"

    @property
    def docs_page(self) -> Path:
        """The first of the Data Docs' pages."""
        return self.docs / "index.html"

    @property
    def dvc_home(self) -> Path:
        """DVC's own folder: its configuration, and its default cache."""
        return self.root / ".dvc"

    @property
    def dvc_yaml(self) -> Path:
        """DVC's pipeline."""
        return self.root / "dvc.yaml"

    @property
    def dvc_lock(self) -> Path:
        """What the pipeline's stages read and made last."""
        return self.root / "dvc.lock"

    @property
    def code_lock(self) -> Path:
        """The names of the code behind each stage, for DVC to depend on."""
        return self.root / "preprocessing.lock"

    @property
    def splits_file(self) -> Path:
        """The append-only ledger sha256 → split; tracked by git, so that a clone keeps yesterday's test set."""
        return self.root / "splits.csv"

    @property
    def prepared(self) -> Path:
        """What DVC's stages make."""
        return self.root / "prepared"

    @property
    def manifest(self) -> Path:
        return self.prepared / "manifest.parquet"

    @property
    def quarantine(self) -> Path:
        """JSON list of `records.Rejection`."""
        return self.prepared / "quarantine.json"

    @property
    def validation(self) -> Path:
        """The report of the last validation (JSON), without what depends on earlier runs."""
        return self.prepared / "validation.json"

    @property
    def features(self) -> Path:
        """What a frozen backbone sees in the clips, where the model reads that."""
        return self.prepared / "features"

    @property
    def shards(self) -> Path:
        return self.prepared / "shards"

    # --- not versioned -----------------------------------------------------------------------------------------------

    @property
    def state(self) -> Path:
        """Everything that is not versioned: servers' homes, locks, logs, caches. Only its owner may read it."""
        return self.root / ".sora"

    @property
    def secret(self) -> Path:
        """The login of the project's own servers; see `credentials`."""
        return self.state / "secret"

    @property
    def tokens(self) -> Path:
        """Bearer tokens of the API, hashed; see `sora token`."""
        return self.state / "tokens.json"

    @property
    def init_note(self) -> Path:
        """What an unfinished `sora init` was making (JSON)."""
        return self.state / "init.json"

    @property
    def probe(self) -> Path:
        """A file that `sora init` writes to see whether the file system shares blocks; removed at once."""
        return self.state / "probe"

    # Locks: each is held by a process, and is released with it.

    @property
    def run_lock(self) -> Path:
        """Held while a run is active."""
        return self.state / "run.lock"

    @property
    def run_note(self) -> Path:
        """Which process holds the run lock, and since when (JSON)."""
        return self.state / "run.json"

    @property
    def up_lock(self) -> Path:
        """Held by `sora up`."""
        return self.state / "up.lock"

    @property
    def alias_lock(self) -> Path:
        """Held while the champion is moved."""
        return self.state / "alias.lock"

    @property
    def backup_lock(self) -> Path:
        """Held by a backup and by `sora gc`."""
        return self.state / "backup.lock"

    @property
    def services_lock(self) -> Path:
        """Held while running servers are looked up and others started."""
        return self.state / "services.lock"

    @property
    def services_use(self) -> Path:
        """Locked (shared) by each process that uses the servers."""
        return self.state / "services.use"

    # Servers

    @property
    def services(self) -> Path:
        """Which servers run, where, and whose they are (JSON)."""
        return self.state / "services.json"

    def server_home(self, name: str) -> Path:
        """The folder of the server `mlflow` or `prefect`."""
        return self.state / name

    def database(self, name: str) -> Path:
        """The SQLite file of the server `mlflow` or `prefect`."""
        return self.server_home(name) / f"{name}.db"

    @property
    def artifacts(self) -> Path:
        """MLflow's artifacts: models, pages, and the stored states of runs."""
        return self.server_home("mlflow") / "artifacts"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    def log(self, name: str) -> Path:
        """The log of a server or of a child process."""
        return self.logs / f"{name}.log"

    # Data

    @property
    def stages(self) -> Path:
        """What DVC's stages record about themselves."""
        return self.state / "stages"

    @property
    def journal(self) -> Path:
        """Facts of videos decoded since the last manifest was written: by an interrupted stage, or by `sora check`."""
        return self.stages / "manifest.jsonl"

    def stage_counts(self, stage: str) -> Path:
        """What the last call of a stage counted (JSON)."""
        return self.stages / f"{stage}.json"

    @property
    def docs(self) -> Path:
        """Data Docs (HTML) of the last validation."""
        return self.state / "data_docs"

    @property
    def validation_side(self) -> Path:
        """The last validation's report with the class balance against the last judged run (JSON)."""
        return self.state / "validation_side.json"

    @property
    def reference(self) -> Path:
        """Videos of each class in the last judged run (JSON)."""
        return self.state / "reference.json"

    @property
    def judged_splits(self) -> Path:
        """The splits that the last judged run recorded (JSON)."""
        return self.state / "judged_splits.json"

    @property
    def splits_copies(self) -> Path:
        """Copies of split ledgers that `sora splits restore` replaced."""
        return self.state / "splits"

    @property
    def check(self) -> Path:
        """Pages of the last `sora check`."""
        return self.state / "check"

    @property
    def audit(self) -> Path:
        """The results of label audits: finished folds, index.html and audit.json."""
        return self.state / "audit"

    @property
    def tune(self) -> Path:
        """Searches for hyper-parameters: a database each, finished folds, index.html."""
        return self.state / "tune"

    @property
    def tune_folds(self) -> Path:
        """A folder for each finished or unfinished fold of a trial."""
        return self.tune / "folds"

    @property
    def tune_page(self) -> Path:
        """The result of the last search."""
        return self.tune / "index.html"

    def tune_study(self, name: str) -> Path:
        """The SQLite file of a search."""
        return self.tune / f"{name}.db"

    @property
    def tune_lock(self) -> Path:
        """Held by `sora tune`."""
        return self.state / "tune.lock"

    @property
    def inbox(self) -> Path:
        """Corrections that are waiting for review."""
        return self.state / "inbox"

    # Runs

    @property
    def work(self) -> Path:
        """A folder for each unfinished nightly: an interrupted one resumes from it."""
        return self.state / "work"

    @property
    def training(self) -> Path:
        """A folder for each run that this clone, as a worker, trains for another clone."""
        return self.state / "training"

    @property
    def last_evaluation(self) -> Path:
        """The page of the last judged candidate."""
        return self.state / "last_evaluation"

    @property
    def last_nightly(self) -> Path:
        """When the last nightly ended well, and how (JSON)."""
        return self.state / "last_nightly.json"

    @property
    def alerted(self) -> Path:
        """The missed nightly that an alert was sent for (JSON)."""
        return self.state / "alerted.json"

    @property
    def last_backup(self) -> Path:
        """The last completed or failed backup (JSON)."""
        return self.state / "last_backup.json"

    @property
    def cache(self) -> CacheFolder:
        """Files of registered models."""
        return CacheFolder(self.state / "cache")

    # --- settings ----------------------------------------------------------------------------------------------------

    def settings(self) -> Settings:
        """What params.yaml says.

        Raises:
            SettingsError: it can't be read, or is wrong.
        """
        try:
            return parse(self.params_file.read_text(encoding="utf-8"), str(self.params_file))
        except OSError as error:
            raise SettingsError(f"can't read {self.params_file}: {error}", fix="run `sora init`") from error


def find_project(start: Path) -> Project:
    """The nearest folder at or above `start` that holds params.yaml.

    Raises:
        SettingsError: there is none.
    """
    start = start.resolve()
    if any("\ud800" <= character <= "\udfff" for character in str(start)):  # neither DVC nor SQLite accepts such a path
        raise SettingsError(f"the folder {str(start)!a} has a name that is not UTF-8", fix="rename the folder")
    for folder in (start, *start.parents):
        project = Project(folder)
        if project.params_file.is_file():
            return project
    raise SettingsError(
        f"no params.yaml in {start} or above it", fix="run `sora init DIR --data FOLDER`, or add --project DIR"
    )
