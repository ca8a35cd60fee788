"""Pipeline parallelism: schedules as tables, point-to-point communication, one executor."""
