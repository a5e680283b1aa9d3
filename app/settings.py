"""Every setting of the service, read from the environment: `SECATEUR_<AREA>_<NAME>`, one group an area.

With nothing set, all state lives in one folder (`SECATEUR_STATE`, `.secateur` by default): SQLite, local artifacts, caches.
`SECATEUR_DATABASE_URL`, `SECATEUR_BROKER_URL` and `SECATEUR_STORE_URL` move parts of it to PostgreSQL, Valkey and S3.
"""

from __future__ import annotations

from functools import cached_property
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.jobs import routing


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DatabaseSettings(_Group):
    url: str = Field(default="", description="SQLAlchemy URL; SQLite in the state folder by default.")
    pool_size: int = Field(default=10, ge=1)


class BrokerSettings(_Group):
    url: str = Field(default="redis://127.0.0.1:6379/0", description="Celery broker: redis:// or rediss://.")


class StoreSettings(_Group):
    url: str = Field(default="", description="`file:///folder` or `s3://bucket/prefix`; the state folder by default.")
    endpoint: str | None = Field(default=None, description="S3 endpoint, if it is not AWS.")


class HttpSettings(_Group):
    max_body_bytes: int = Field(default=1_000_000, ge=1_000)
    max_wait_seconds: float = Field(default=60, ge=0, description="The longest `?wait=`.")
    max_streams: int = Field(default=1_000, ge=1, le=10_000, description="Open event streams that one process serves.")
    max_streams_per_tenant: int = Field(default=200, ge=1, description="Those of one tenant, in one process.")


class HubSettings(_Group):
    endpoint: str = Field(default="https://huggingface.co")
    timeout_seconds: float = Field(
        default=20, gt=0, description="For all that is asked of the hub before a job is accepted; a download's every wait."
    )


class ModelsSettings(_Group):
    root: Path | None = Field(default=None, description="The local models; by default `models` in the state folder.")


Queue = Annotated[str, StringConstraints(pattern=routing.PATTERN)]
Queues = Annotated[tuple[Queue, ...], Field(min_length=1)]


class JobsSettings(_Group):
    queues: Queues = Field(
        default=(routing.CPU,),
        description='Queues of this installation: `cpu`, and one a size of GPU, as JSON: `["gpu.24g", "gpu.80g"]`.',
    )


class WorkerSettings(_Group):
    queues: Queues = Field(
        default=(routing.CPU,), description="Queues that this worker takes jobs from, those of smaller GPUs included."
    )
    lease_seconds: float = Field(default=30, gt=0.5, description="How long a silent worker keeps its job.")
    heartbeat_seconds: float = Field(default=2, gt=0.05, description="Between renewals of the lease and looks for a cancel.")
    patience_seconds: float = Field(default=600, ge=0, description="How long a store or hub that is away is tried again.")
    drain_seconds: float = Field(
        default=120, ge=0, description="How long a worker that is told to stop goes on, to the end of its block or its job."
    )
    terminate_seconds: float = Field(default=3, gt=0, description="Between SIGTERM and SIGKILL of a child that must end.")
    max_barren_attempts: int = Field(default=3, ge=1, description="Attempts in a row without a new block, then it fails.")


class RetentionSettings(_Group):
    artifact_days: float | None = Field(
        default=None, gt=0, description="Files of jobs are kept so long; by default for ever."
    )
    grace_seconds: float = Field(default=3_600, ge=0, description="What is younger in the store is not collected yet.")
    collect_seconds: float = Field(default=600, gt=0, description="Between two collections of the store.")
    log_days: float = Field(default=30, gt=0, description="Logs of attempts and integrations are kept so long.")
    cache_days: float = Field(default=30, ge=1, description="So are downloaded models after their last use.")


class DiskSettings(_Group):
    reserve_gb: float = Field(default=1, ge=0, description="Below so much free disk no job is accepted and none is begun.")

    @property
    def reserve_bytes(self) -> int:
        return int(self.reserve_gb * 1e9)


class SchedulerSettings(_Group):
    relay_seconds: float = Field(default=2, gt=0, description="Between two rounds of the outbox relay.")
    ring_again_seconds: float = Field(default=30, gt=0, description="A job queued for so long has its doorbell rung again.")
    reap_seconds: float = Field(default=5, gt=0, description="Between two rounds of the reaper.")
    presence_seconds: float = Field(default=10, gt=0, le=20, description="Between two looks at which workers are there.")


# Seconds before the second try, the third and so on. After the last one a delivery has failed.
_RETRY_SECONDS = (5.0, 300.0, 1_800.0, 7_200.0, 18_000.0, 36_000.0, 50_400.0)


class WebhooksSettings(_Group):
    round_seconds: float = Field(default=1, gt=0, description="Between two looks for messages that are due.")
    retry_seconds: tuple[float, ...] = Field(default=_RETRY_SECONDS, description="Pauses before the second try and so on.")
    timeout_seconds: float = Field(default=15, gt=0, description="A receiver has to answer within this.")
    disable_after_seconds: float = Field(default=432_000, gt=0, description="Who fails for so long is disabled.")
    allow_http: bool = Field(default=False, description="Let endpoints be http:// and not only https://.")
    allow_networks: tuple[IPv4Network | IPv6Network, ...] = Field(
        default=(), description="Networks that are not public and may be called nevertheless, as a JSON list."
    )


class IntegrationsSettings(_Group):
    default: tuple[dict[str, Any], ...] = Field(
        default=(), description='The integrations of a job that names none, as JSON: `[{"name": "mlflow"}]`.'
    )
    round_seconds: float = Field(default=2, gt=0, description="Between two looks for work that is due.")
    parallel: int = Field(default=2, ge=1, description="How many are under way at once, each in a process of its own.")
    retry_seconds: tuple[float, ...] = Field(default=_RETRY_SECONDS, description="Pauses before the second try and so on.")
    timeout_seconds: float = Field(default=21_600, gt=0, description="One try is ended after this.")
    lease_seconds: float = Field(default=60, gt=0.5, description="When the work of a lost scheduler is done again.")


class MlflowSettings(_Group):
    url: str | None = Field(default=None, description="The tracking server that models are logged to and may be read from.")
    timeout_seconds: float = Field(default=20, gt=0, description="For all that is asked of it before a job is accepted.")


class Settings(BaseSettings):
    """The whole of it; `Settings()` reads the environment."""

    model_config = SettingsConfigDict(
        env_prefix="SECATEUR_",
        env_nested_delimiter="_",
        env_nested_max_split=1,
        frozen=True,
        extra="ignore",
        # A URL holds a password: what is wrong with it is told without showing it.
        hide_input_in_errors=True,
    )

    state: Path = Path(".secateur")
    keyring: Path | None = Field(default=None, description="The keyring file; in the state folder by default.")
    database: DatabaseSettings = DatabaseSettings()
    broker: BrokerSettings = BrokerSettings()
    store: StoreSettings = StoreSettings()
    # Not `api`: SECATEUR_API_KEY is the client's variable, and must not be read as a setting of the service.
    http: HttpSettings = HttpSettings()
    hub: HubSettings = HubSettings()
    models: ModelsSettings = ModelsSettings()
    jobs: JobsSettings = JobsSettings()
    worker: WorkerSettings = WorkerSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    retention: RetentionSettings = RetentionSettings()
    disk: DiskSettings = DiskSettings()
    webhooks: WebhooksSettings = WebhooksSettings()
    integrations: IntegrationsSettings = IntegrationsSettings()
    mlflow: MlflowSettings = MlflowSettings()

    @cached_property
    def state_folder(self) -> Path:
        return self.state.expanduser().resolve()

    @cached_property
    def database_url(self) -> str:
        return self.database.url or f"sqlite+aiosqlite:///{self.state_folder / 'secateur.sqlite'}"

    @cached_property
    def store_url(self) -> str:
        return self.store.url or (self.state_folder / "artifacts").as_uri()

    @cached_property
    def models_root(self) -> Path:
        return (self.models.root or self.state_folder / "models").expanduser().resolve()

    @cached_property
    def keyring_file(self) -> Path:
        return (self.keyring or self.state_folder / "keyring.json").expanduser().resolve()

    @cached_property
    def work_folder(self) -> Path:
        """Where attempts run; a folder each job, one below it each attempt."""
        return self.state_folder / "work"

    @cached_property
    def cache_folder(self) -> Path:
        """Downloaded models and texts and dense perplexities, a folder each tenant."""
        return self.state_folder / "cache"
