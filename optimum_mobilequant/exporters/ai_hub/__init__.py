"""Compile, link and measure on Qualcomm AI Hub, through the ``qai_hub`` client.

``access`` reads the client's configuration and talks to the service, ``devices`` finds the device, ``folders`` reads
the ``.aimet`` folders of the qnn target, ``job_options`` holds the option strings, ``records`` the jobs on disk,
``run`` sends them and follows them, ``results`` fetches what they made. Nothing imports ``qai_hub`` before it is used.
"""

from __future__ import annotations

from .export import export_ai_hub
from .folders import GraphFolder, read_folders
from .run import HubRun, run_jobs

__all__ = ["GraphFolder", "HubRun", "export_ai_hub", "read_folders", "run_jobs"]
