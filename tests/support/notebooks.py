"""Runs a notebook with this Python, on loopback, and stops its kernel; nothing of Jupyter needs to be set up."""

import sys
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient


class OwnKernel(AsyncKernelManager):
    """A kernel of this interpreter, whatever kernels a person has installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def run_notebook(path: Path, *, cell_timeout_s: int = 60, **env: str) -> Any:
    """Run all cells in the notebook's folder; return the notebook with its outputs. Raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_manager_class=OwnKernel,  # made, and stopped, by the client; it listens on 127.0.0.1
        timeout=cell_timeout_s,
        startup_timeout=60,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    return client.execute(env=env)
