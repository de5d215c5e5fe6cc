"""How much memory this process takes, as the benchmarks measure it. (Linux only.)"""


def resident(name: str) -> int:
    """Bytes of VmRSS (what it holds now) or VmHWM (the most that it held so far)."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(f"{name}:"):
                kilobytes = line.split()[1]
                return int(kilobytes) * 1024
    raise ValueError(f"/proc/self/status has no line {name}")
