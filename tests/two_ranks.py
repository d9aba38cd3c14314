"""repan in two processes of one job, with the network of `few_blocks`: what torchrun starts, in a third of its time.

Both are forked from one process that has imported everything.
"""

import os
import socket
import sys

import torch._dynamo
import torch.distributed  # noqa: F401 # data parallelism needs both

from repan_cli.cli import app
from repan_cli.commands import train  # noqa: F401
from repan_cli.display import plots
from repan_cli.models import repvgg_cifar
from repan_cli.session import runner  # noqa: F401

if __name__ == "__main__":
    repvgg_cifar.DEPTHS_A, plots.draw_curves = (1, 1, 1, 1, 1), lambda *_, **__: None
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = []
    for rank in range(2):
        job = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        child = os.fork()
        if child == 0:
            os.environ |= {name: str(value) for name, value in job.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            app.main()
        ranks.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks))
