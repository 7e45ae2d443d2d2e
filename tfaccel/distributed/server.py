"""One process of a parameter-server cluster: `python -m tfaccel.distributed.server SPEC JOB INDEX`.

It serves a chief until it is ended, or until the process that started it is gone.
"""

import json
import os
import sys
import threading
import time

_POLL_SECONDS = 0.5


def serve(spec: dict[str, list[str]], job: str, index: int, parent: int) -> None:
    """Runs a TensorFlow server.

    Args:
        spec: addresses ("host:port") of all processes, by job.
        job: "ps" or "worker".
        index: of this process in its job.
        parent: process that is served; when it ends, so does this one.
    """
    import tensorflow as tf

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os._exit(0)  # the server waits in native code, where no exception reaches it

    threading.Thread(target=watch, daemon=True).start()
    server = tf.distribute.Server(
        tf.train.ClusterSpec(spec), job_name=job, task_index=index, protocol="grpc"
    )
    server.join()


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3]), os.getppid())
