"""All settings of a server in one frozen value. Precedence: flags, environment, file, defaults.

The environment prefix is ``RESIGHT_`` (``RESIGHT_MAX_BATCH=16``); the file is TOML with the same names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from resight.errors import RecipeError
from resight.image import MAX_BYTES, MAX_PIXELS
from resight.machine import cores
from resight.runtime.base import Provider
from resight.runtime.engine import default_folder
from resight.validation import first_problem, suggestion

MIB = 1024 * 1024
DAY_S = 86_400
PREFIX = "RESIGHT_"
ADDRESS = r"^(\[[0-9a-fA-F:]+\]|[^:\[\]]+):\d{1,5}$"


class Settings(BaseSettings):
    """Settings of `resight.service.app.run`. Times are in seconds, sizes in bytes or pixels.

    Attributes:
        bundle: bundle folder of the model to serve.
        models: folder with further bundles, which can be loaded by name; None = only ``bundle``.
        trusted_keys: minisign public keys, or files with them; if set, every bundle must be signed by one of them.
        data: folder of the gallery; created when missing, locked by one server at a time.
        listen: ``HOST:PORT``; port 0 selects a free port, written to ``server.json``.
        auth: ``tokens`` always requires a token; ``auto`` does once a token was created in ``data``.
        tls_cert: PEM file of the certificate with its chain; with ``tls_key`` the server speaks TLS only.
        tls_key: PEM file of its private key, not readable by other users.
        tls_client_ca: PEM file of the authorities whose clients may connect (mTLS); None = any client.
        behind_tls_proxy: a TLS proxy is the only client of this port.
        rate_limit: calls per second of one principal; 0 = no limit.
        rate_burst: capacity of a principal's token bucket, in calls.
        reflection: serve ``grpc.reflection``; None = only on loopback.
        provider: runtime and device of the model; there is no fallback to another one.
        precision: which graph of the bundle to run.
        device_id: index of the GPU.
        engine_cache: folder of TensorRT engines, private to the user; created when missing.
        inference_threads: onnxruntime threads on the CPU; 0 = one for each core the process may use.
        decode_threads: number of crops decoded in parallel.
        decode_pixels: limit on the pixels of full-size images in memory, over all threads; up to 9 bytes per pixel.
        max_batch: crops of one inference; on the CPU at most 4 (`resight.runtime.onnx`): larger batches are no faster.
        batch_delay_s: wait for more crops when the model is idle; 0 = batch only what arrives while it is busy.
        max_queue: crops admitted and not yet finished, for each priority (default: 8 batches).
        max_rpcs: calls in flight. Twice ``max_queue``, so that our overload errors, which say when to retry, come
            before gRPC's, which do not. ``max_rpcs * max_message_bytes`` bounds the memory of requests.
        max_message_bytes: of a request; 64 crops of 100 KB fit.
        max_rerank_candidates: of one search; 1000 of 512-d take 57 ms of one core, growing with the square.
        max_stream_items: items of one stream that are read and not yet finished (default: one batch).
        deadline_s: of a single-item call when the client set none.
        batch_deadline_s: of a batch call when the client set none.
        drain_delay_s: between reporting NOT_SERVING and refusing calls, so that load balancers notice.
        drain_grace_s: for calls in flight to finish.
        purge_interval_s: how often expired entries are deleted from disk (results exclude them at once).
        quick_check_s: time limit of the database check at start.
        disk_low_bytes: writes are refused below this free space on the disk of ``data``; 0 = no limit.
        disk_low_percent: the same as a percentage of the disk; writes resume 5 points above it.
        audit_retention_s: how long audit rows are kept; at least a day.
        keep_retired_space_s: how long the features of a previous space are kept, for switching back.
        max_tenants_open: galleries in memory.
        index_type: of every collection; ``auto`` = by its size.
        index_device: where float16 features are scanned; ``auto`` = on a GPU if faiss finds one.
        index_flat_max: entries up to which ``auto`` scans float32 features.
        index_half_max: entries up to which ``auto`` scans float16 features; above, it uses an HNSW graph.
        index_tail_max: number of entries outside the graph at which it is rebuilt.
        index_sample: one in this many approximate searches is repeated exactly to measure recall; 0 = none.
        gallery: ``embedded``, or Milvus as candidate index: ``milvus://HOST:PORT``, a URL, or a milvus-lite file.
        milvus_token: credential for Milvus; set it in the environment rather than on the command line.
        canary_interval_s: between two self-test crops sent through the server, and the time limit of one.
        max_search_queue: queries waiting or running; more are refused.
        metrics_listen: ``HOST:PORT`` of ``/metrics``, ``/livez`` and ``/readyz``; None = off; port 0 = any.
        metrics_collections: collections that metrics list by name; the rest are summed.
        otlp_endpoint: URL of an OpenTelemetry collector that accepts OTLP over gRPC; None = no traces.
        log_format: of the log lines.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    bundle: Path
    models: Path | None = None
    trusted_keys: tuple[str, ...] = ()
    data: Path
    listen: str = Field(default="127.0.0.1:50051", pattern=ADDRESS)
    auth: Literal["auto", "tokens"] = "auto"
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    behind_tls_proxy: bool = False
    rate_limit: float = Field(default=0.0, ge=0.0)
    rate_burst: int = Field(default=20, ge=1)
    reflection: bool | None = None
    provider: Provider = "cpu"
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    device_id: int = Field(default=0, ge=0, le=63)
    engine_cache: Path = Field(default_factory=default_folder)
    inference_threads: int = Field(default=0, ge=0, le=256)
    decode_threads: int = Field(default=min(8, cores()), ge=1, le=64)
    decode_pixels: int = Field(default=16_000_000, ge=256)
    max_batch: int = Field(default=32, ge=1, le=1024)
    batch_delay_s: float = Field(default=0.0, ge=0.0, le=1.0)
    max_queue: int = Field(default=256, ge=1, le=65536)
    max_rpcs: int = Field(default=512, ge=1, le=65536)
    max_message_bytes: int = Field(default=8 * MIB, ge=64 * 1024, le=256 * MIB)
    max_image_bytes: int = Field(default=MAX_BYTES, ge=1024, le=64 * MIB)
    max_image_pixels: int = Field(default=MAX_PIXELS, ge=256, le=89_478_485)  # Pillow's own warning threshold
    max_batch_items: int = Field(default=64, ge=1, le=1024)
    max_shots: int = Field(default=32, ge=1, le=1024)
    max_top_k: int = Field(default=1000, ge=1, le=10_000)
    max_rerank_candidates: int = Field(default=1000, ge=1, le=2000)
    max_stream_items: int = Field(default=32, ge=1, le=1024)
    deadline_s: float = Field(default=10.0, gt=0.0)
    batch_deadline_s: float = Field(default=60.0, gt=0.0)
    drain_delay_s: float = Field(default=0.0, ge=0.0)
    drain_grace_s: float = Field(default=10.0, ge=0.0)
    purge_interval_s: float = Field(default=60.0, gt=0.0)
    quick_check_s: float = Field(default=5.0, ge=0.0)
    disk_low_bytes: int = Field(default=256 * MIB, ge=0)  # 16 write-ahead logs of the maximum size
    disk_low_percent: float = Field(default=2.0, ge=0.0, lt=95.0)
    audit_retention_s: float = Field(default=90 * DAY_S, ge=DAY_S)
    keep_retired_space_s: float = Field(default=7 * DAY_S, ge=0.0)
    max_tenants_open: int = Field(default=64, ge=1, le=4096)
    index_type: Literal["auto", "flat", "flat-fp16", "hnsw"] = "auto"
    index_device: Literal["auto", "cpu", "cuda"] = "auto"
    index_flat_max: int = Field(default=100_000, ge=1)
    index_half_max: int = Field(default=1_000_000, ge=1)
    index_tail_max: int = Field(default=50_000, ge=1)
    index_sample: int = Field(default=1000, ge=0)
    gallery: str = Field(default="embedded", pattern=r"^(embedded|milvus://[^/]+|https?://.+|.+\.db)$")
    milvus_token: SecretStr = SecretStr("")
    canary_interval_s: float = Field(default=10.0, gt=0.0)
    max_search_queue: int = Field(default=1024, ge=1, le=65536)
    metrics_listen: str | None = Field(default=None, pattern=ADDRESS)
    metrics_collections: int = Field(default=100, ge=0, le=10_000)
    otlp_endpoint: str | None = Field(default=None, pattern=r"^https?://[^/\s@]+$")
    log_format: Literal["text", "json"] = "text"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment; `load_settings` adds the file below them."""
        return init_settings, env_settings

    @model_validator(mode="after")
    def _check_queue_holds_a_batch(self) -> Self:
        if self.max_queue < self.max_batch_items:
            raise ValueError(f"max_queue must hold a batch of max_batch_items={self.max_batch_items}")
        return self

    @model_validator(mode="after")
    def _check_certificate_and_key(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: set both or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError(
                "tls_client_ca requires tls_cert and tls_key: only a TLS server receives client certificates"
            )
        return self

    @property
    def batch(self) -> int:
        """Maximum number of crops of one inference."""
        if self.provider != "cpu":
            return self.max_batch
        from resight.runtime.onnx import CROPS_PER_CORE  # imported here: onnxruntime is slow to import for --help

        return min(self.max_batch, CROPS_PER_CORE)

    @property
    def batches_at_once(self) -> int:
        """Number of batches embedded in parallel: one per inference thread on a CPU, one on a GPU."""
        if self.provider != "cpu":
            return 1
        return self.inference_threads or cores()

    @property
    def host(self) -> str:
        """The host to listen on, without brackets."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port to listen on; 0 = any."""
        return int(self.listen.rpartition(":")[2])


def load_settings(*, config: Path | None = None, **flags: Any) -> Settings:
    """Merge flags, environment and file.

    Args:
        config: a TOML file whose keys are fields of `Settings`.
        **flags: from the command line; None = not set.

    Raises:
        RecipeError: an unknown setting, a missing one, or a value out of range.
    """
    if config is not None and not config.is_file():
        raise RecipeError(f"settings file {config} does not exist: pass a TOML file with --config, or omit it")

    class WithFile(Settings):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *args: Any, **sources: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            sources_above = Settings.settings_customise_sources(settings_cls, *args, **sources)
            return (*sources_above, TomlConfigSettingsSource(settings_cls, config)) if config else sources_above

    try:
        return WithFile(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        problem = first_problem(error)
        name = problem.key
        if problem.kind == "missing":
            message = f"setting {name} is missing: set --{name}, {PREFIX}{name.upper()} or a line in the --config file"
        elif problem.kind == "unknown":
            message = f"there is no setting {name}{suggestion(name, Settings.model_fields)}: see docs/operations.md"
        else:
            message = f"{f'setting {name}' if name else 'settings'}: {problem.reason}: see docs/operations.md"
        raise RecipeError(message, field=name) from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"settings file {config} cannot be read as TOML: {error}") from error
