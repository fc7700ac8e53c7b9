"""The pieces of `ch16/request_scheduler.py`: a mix of requests, a simulated engine, the real one."""
