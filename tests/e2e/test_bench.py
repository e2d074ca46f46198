"""`python -m bench` runs; what it measures is nobody's business here."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import orjson

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
