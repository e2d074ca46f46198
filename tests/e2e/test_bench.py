"""`python -m bench` runs and switches what it says; what it measures is nobody's business here."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import orjson

from bench import client, tracing
from bench.shapes import DIAMOND
from bench.switched_tracing import OFF, ON
from tests.otlp_sink import otlp_sink

ROOT = Path(__file__).resolve().parents[2]
RUN_S = 90.0


async def test_a_small_run_prints_its_table_and_writes_its_file(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.run", "--scale", "0.01", "--rounds", "1"),
        *("--only", "diamond", "--markdown", "--json", str(figures)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        said, complained = await asyncio.wait_for(process.communicate(), RUN_S)
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    assert process.returncode == 0, complained.decode()
    assert "| diamond, 32 at once " in said.decode()
    found = orjson.loads(await asyncio.to_thread(figures.read_bytes))
    assert {figure["unit"] for figure in found["figures"]} == {"ms", "runs/s", "ms/run"}
    assert all(figure["median"] > 0 for figure in found["figures"])


async def test_tracing_is_switched_in_a_service_that_runs(dsn: str) -> None:
    unsafe = {"FLEXRUN_ALLOW_UNSAFE_POSTGRES": "true"}
    async with asyncio.timeout(RUN_S), otlp_sink() as sink:
        settings = unsafe | {"OTEL_EXPORTER_OTLP_ENDPOINT": sink.url}
        async with tracing._service(dsn, settings) as service:
            service.process.send_signal(OFF)
            await client.at_once(service.port, DIAMOND, 4, clients=2)
            service.process.send_signal(ON)
            await client.at_once(service.port, DIAMOND, 3, clients=2)
            while len(sink.traces()) < 3:
                sink.side.arrived.clear()
                await sink.side.arrived.wait()
        assert len(sink.traces()) == 3
