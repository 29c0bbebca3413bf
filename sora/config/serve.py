"""The section `serve`: the API and its bounds."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from sora.config.section import FileBounds, Section


class Serve(FileBounds, Section):
    """Where the server listens, and what a call may cost."""

    host: str = Field("127.0.0.1", description="address to listen on; callers on any but loopback need a token")
    port: int = Field(8000, ge=0, le=65535, description="0: any free port")
    max_bytes: int = Field(
        200_000_000, ge=1, description="bytes of an uploaded video, or of all videos of one call together"
    )
    max_files: int = Field(16, ge=1, le=1000, description="files in one call")
    max_seconds: float = Field(600, gt=0, description="seconds that a video lasts")
    max_pixels: int = Field(4096 * 2304, ge=1, description="pixels of a frame; the default is 4096x2304")
    max_frames: int = Field(40_000, ge=1, description="frames of a video")
    decode_workers: int = Field(2, ge=1, le=64, description="processes that decode; the model gets the other cores")
    decode_timeout: float = Field(30, gt=0, description="seconds that decoding a video may take")
    decode_memory: int = Field(2_000_000_000, ge=100_000_000, description="bytes, of each process that decodes")
    upload_timeout: float = Field(120, gt=0, description="seconds from an upload's first byte to its last")
    request_timeout: float = Field(
        180, gt=0, description="seconds from a request's first byte to its answer, the upload included"
    )
    header_timeout: float = Field(
        10, gt=0, le=300, description="seconds from a request's first byte to the end of its headers"
    )
    queue: int = Field(64, ge=1, description="predictions in progress at once; one more is answered with 429")
    max_connections_per_peer: int = Field(
        128,
        ge=0,
        description="beyond this, those without a request are closed; 0 behind a proxy: it makes all of them",
    )
    origins: tuple[str, ...] = Field(
        (),
        description="of other pages that may send requests: [https://sora.example] if a proxy changes Host",
    )
    poll_seconds: float = Field(2, gt=0, description="seconds between two checks for a new champion")
    drain_seconds: float = Field(
        0,
        ge=0,
        le=300,
        description="seconds after SIGTERM in which /readyz says 503 and all else continues, for a proxy to notice",
    )
    inbox_files: int = Field(1000, ge=0, description="corrections that may wait for review (`sora data review`)")
    inbox_bytes: int = Field(2_000_000_000, ge=0, description="bytes of all waiting corrections together")

    @field_validator("origins")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not re.fullmatch(r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?", origin):
                raise ValueError(
                    f"{origin!r} is not an origin; write it as https://sora.example or http://10.0.0.5:8080"
                )
        return value
