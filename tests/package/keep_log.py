"""Compiler launcher: runs the command it is given and keeps what the compiler said in OBJECT.log, beside the object.

ninja shows a compiler's words once, when it compiles; the gates read what ptxas said of every kernel, whoever built it when.
"""

import subprocess
import sys

command = sys.argv[1:]
done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
sys.stdout.write(done.stdout)
if "-o" in command:
    with open(command[command.index("-o") + 1] + ".log", "w") as log:
        log.write(done.stdout)
sys.exit(done.returncode)
