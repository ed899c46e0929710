"""Who is alive, where each process is, who holds the others up: threads and sockets beside the collectives.

A collective call on a process group waits for every rank. When one of them dies, hangs or throws, the others wait in
it, and none can say for whom. So each process has a small thread that sends its position to rank 0 over a plain
socket (:mod:`.client`, :mod:`.server`), rank 0's thread judges (:mod:`.verdict`), and every process hears the verdict
and comes down. Nothing here makes a collective call, and nothing is started where there is one process.
"""
