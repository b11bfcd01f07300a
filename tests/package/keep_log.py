"""Compiler launcher: runs the command it is given; keeps what the compiler said in OBJECT.log, and its seconds of one core in
OBJECT.seconds, beside the object.

ninja shows a compiler's words once, when it compiles; the gates read what ptxas said of every kernel, whoever built it when.
"""

import resource
import subprocess
import sys

command = sys.argv[1:]
done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
sys.stdout.write(done.stdout)
if "-o" in command:
    result = command[command.index("-o") + 1]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(result + ".log", "w") as log, open(result + ".seconds", "w") as seconds:
        log.write(done.stdout)
        seconds.write(f"{used.ru_utime + used.ru_stime:.2f}\n")
sys.exit(done.returncode)
