"""Scripts that tests run as processes of their own are no test modules."""

collect_ignore = ["fake_cuda_step.py", "keep_log.py"]
