"""The worker: all runs of a comparison that are left, one after the other, on one of the replicas."""

import os

from muonwire.compare.config import Comparison
from muonwire.compare.progress import comparison_progress
from muonwire.compare.runs import finish_run, pending, prepare_peer, prepare_run, stopped
from muonwire.train.launch import on_stop_signal, process_group, set_threads
from muonwire.train.recording import OTHERS_SAY_AFTER_S
from muonwire.transport.waiting import SAID_AT_S, watching


def worker(config: Comparison, peers: bool = False) -> None:
    """All pending runs of the recipes, or of the peers, one after the other, on one of the replicas."""
    task = config.task.make()
    first = os.environ.get("RANK", "0") == "0"
    first_s = SAID_AT_S[0] if first else OTHERS_SAY_AFTER_S
    with process_group() as make_transport, comparison_progress(config, enabled=first) as shown:
        set_threads(config.replicas, config.threads)
        while runs := pending(config, peers=peers):
            for run in runs:
                transport = make_transport()
                trainer = (prepare_peer if peers else prepare_run)(config, run, task, transport)
                shown.at(run, trainer.step)
                with on_stop_signal(trainer.request_stop), watching(transport.waits, first_s=first_s):
                    result = trainer.run(lambda progress, run=run: shown.at(run, progress.step))  # type: ignore[misc]
                finish_run(trainer, result)
                if not result.finished:
                    raise stopped(config)
                shown.finish(run)
            # Everyone has seen the last result before anyone looks at what is left.
            make_transport().gather(b"done", purpose="control")
