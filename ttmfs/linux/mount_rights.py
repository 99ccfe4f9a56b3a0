"""Why the kernel may refuse a mount to this process, and what to do."""

__all__ = ["advice"]

_CAP_SYS_ADMIN = 1 << 21  # include/uapi/linux/capability.h


def advice(refusal: str) -> str:
    """What to do after fusermount3 was refused a mount, by its error text; "" if rights are not the reason."""
    with open("/proc/thread-self/status", encoding="ascii", errors="replace") as file:
        rows = dict(line.split(":", 1) for line in file)
    capable = bool(int(rows["CapEff"], 16) & _CAP_SYS_ADMIN)
    if "Operation not permitted" in refusal:
        if int(rows["Uid"].split()[1]) and int(rows["NoNewPrivs"]):
            return "set-user-id programs such as fusermount3 have no effect here (no_new_privs): mount it as root"
        if not capable:
            return (
                "a process that mounts needs CAP_SYS_ADMIN; for a container: --cap-add SYS_ADMIN, or bind a directory "
                "of the host in which ttmfs is mounted (docs/containers.md)"
            )
    if "Permission denied" in refusal and capable:
        return "a security module may forbid mounts; for a container: --security-opt apparmor=unconfined"
    return ""
