"""Everything a server can be told, in one frozen value: flags before environment before file before defaults.

The environment prefix is ``RESIGHT_`` (``RESIGHT_MAX_BATCH=16``); the file is TOML with the same names.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from resight.errors import RecipeError
from resight.image import MAX_BYTES, MAX_PIXELS
from resight.machine import cores
from resight.runtime.base import Provider
from resight.runtime.engine import default_folder

MIB = 1024 * 1024
DAY_S = 86_400
PREFIX = "RESIGHT_"
ADDRESS = r"^(\[[0-9a-fA-F:]+\]|[^:\[\]]+):\d{1,5}$"


class Settings(BaseSettings):
    """What `resight.service.app.run` needs. Times in seconds, sizes in bytes or pixels.

    Attributes:
        bundle: folder of the model to serve.
        models: folder of more bundles, loaded by name; None = the bundle alone.
        trusted_keys: minisign public keys, or files of them; with any, every bundle must be signed by one.
        data: folder of the gallery; made when missing, held by one server at a time.
        listen: ``HOST:PORT``; port 0 takes a free one, told in ``server.json``.
        auth: ``auto`` asks for a token once one was made in ``data``; ``tokens`` always does.
        tls_cert: PEM file of the certificate with its chain; with ``tls_key`` the server speaks TLS only.
        tls_key: PEM file of its private key, closed to others.
        tls_client_ca: PEM file of the authorities whose clients may connect (mTLS); None = any client.
        behind_tls_proxy: a proxy with TLS stands before this port, and nothing else reaches it.
        rate_limit: calls a second of one principal; 0 = no limit.
        rate_burst: calls of one principal at once, after a rest.
        reflection: answer ``grpc.reflection``; None = only on loopback.
        provider: what runs the model, and where; never another one instead.
        precision: which of the bundle's graphs.
        device_id: which GPU.
        engine_cache: folder of TensorRT's engines, private to the user; made when missing.
        inference_threads: of onnxruntime on the CPU; 0 = one for each core the process may use.
        decode_threads: crops decoded at once.
        decode_pixels: of full-size images in memory at once, however many threads; each takes up to 9 bytes.
        max_batch: crops of one inference; on the CPU at most 4 (`resight.runtime.onnx`): more gain nothing.
        batch_delay_s: wait for more crops when the model is idle; 0 batches what gathers while it is busy.
        max_queue: crops admitted and not yet answered (8 batches), of each priority.
        max_rpcs: calls in flight, twice ``max_queue``: our refusals say when to come back, gRPC's own do not. Times
            ``max_message_bytes`` this is the fence on memory.
        max_message_bytes: 64 crops of 100 KB fit.
        max_rerank_candidates: of one search; 1000 of 512-d take 57 ms of a core, and it grows with the square.
        max_stream_items: of one stream, read and not yet answered; one batch.
        deadline_s: for a lone item when the client set none.
        batch_deadline_s: the same for batches.
        drain_delay_s: between turning NOT_SERVING and refusing calls, for load balancers to notice.
        drain_grace_s: for calls in flight to end.
        purge_interval_s: how often expired entries leave the disk (they leave the answers at once).
        quick_check_s: at most this long is the database checked at start.
        disk_low_bytes: with less room on the data folder's disk writes are refused; 0 = no such mark.
        disk_low_percent: the same as a share of the disk, 0..100; they go on 5 points above it.
        audit_retention_s: how long rows of the audit are kept; a day at least.
        keep_retired_space_s: how long the features of a space that was switched away from are kept for the way back.
        max_tenants_open: galleries in memory at once.
        index_type: of every collection; ``auto`` = by its size.
        index_device: where float16 features are scanned; ``auto`` = on a GPU when faiss sees one.
        index_flat_max: entries up to which ``auto`` scans float32 features.
        index_half_max: entries up to which ``auto`` scans float16 features; above, a graph is walked.
        index_tail_max: a graph with so many newer entries beside it is built anew.
        index_sample: one in so many approximate searches is repeated exactly; 0 = none.
        gallery: ``embedded``, or Milvus as finder of candidates: ``milvus://HOST:PORT``, a URL, a file of milvus-lite.
        milvus_token: that Milvus asks for; better in the environment than on a command line.
        canary_interval_s: between two crops that prove the way through the server, and how long one may take.
        max_search_queue: queries that wait or are searched; more are refused.
        metrics_listen: ``HOST:PORT`` of ``/metrics``, ``/livez`` and ``/readyz``; None = none; port 0 takes a free one.
        metrics_collections: collections that metrics tell by name; those beyond are summed.
        otlp_endpoint: URL of an OpenTelemetry collector that takes OTLP over gRPC; None = no traces.
        log_format: of each line of the log.
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
    max_image_pixels: int = Field(default=MAX_PIXELS, ge=256, le=89_478_485)  # Pillow's own warning begins there
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
    disk_low_bytes: int = Field(default=256 * MIB, ge=0)  # a whole write-ahead log, 16 times
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
        """Flags, then environment; `load_settings` puts the file below them."""
        return init_settings, env_settings

    @model_validator(mode="after")
    def _a_batch_fits_the_queue(self) -> Self:
        if self.max_queue < self.max_batch_items:
            raise ValueError(f"max_queue must hold a batch of max_batch_items={self.max_batch_items}")
        return self

    @model_validator(mode="after")
    def _certificate_and_key_come_together(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key come together: give both or none")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError(
                "tls_client_ca needs tls_cert and tls_key: only a server with TLS sees clients' certificates"
            )
        return self

    @property
    def batch(self) -> int:
        """Crops of the largest inference."""
        if self.provider != "cpu":
            return self.max_batch
        from resight.runtime.onnx import (
            CROPS_PER_CORE,  # here: onnxruntime is large, and settings are read for --help too
        )

        return min(self.max_batch, CROPS_PER_CORE)

    @property
    def batches_at_once(self) -> int:
        """Batches that are embedded at once: on a CPU one for each core that embeds, on a GPU one."""
        if self.provider != "cpu":
            return 1
        return self.inference_threads or cores()

    @property
    def host(self) -> str:
        """The listening host, without brackets."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The listening port; 0 = any."""
        return int(self.listen.rpartition(":")[2])


def load_settings(*, config: Path | None = None, **flags: Any) -> Settings:
    """Join flags, environment and file.

    Args:
        config: a TOML file with names of `Settings`.
        **flags: from the command line; None = not given.

    Raises:
        RecipeError: an unknown name, a missing one or a value out of range.
    """
    if config is not None and not config.is_file():
        raise RecipeError(f"settings file {config} is not there: name a TOML file with --config, or leave it out")

    class WithFile(Settings):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *args: Any, **sources: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            above = Settings.settings_customise_sources(settings_cls, *args, **sources)
            return (*above, TomlConfigSettingsSource(settings_cls, config)) if config else above

    try:
        return WithFile(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            told = f"setting {name} is missing: give --{name}, {PREFIX}{name.upper()} or a line in the --config file"
        elif first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, Settings.model_fields, 1)
            told = f"there is no setting {name}{f', did you mean {near[0]}?' if near else ''}: see docs/operations.md"
        else:
            told = f"setting {name}: {first['msg']}, found {first['input']!r}: see docs/operations.md"
        raise RecipeError(told, field=name) from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"settings file {config} cannot be read as TOML: {error}") from error
