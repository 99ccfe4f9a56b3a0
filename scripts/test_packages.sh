#!/bin/bash
# Tries the Debian package, as root: for each release named (bookworm and trixie), builds it in a clean chroot, runs
# lintian, and installs it in another, which a systemd of its own boots. There it mounts, upgrades while pages are held,
# refuses to be removed, and is purged. Needs mmdebstrap. The chroots use the package sources of this machine.
# shellcheck disable=SC2016 # other shells expand the scripts in single quotes
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || { echo "test-packages: run it as root" >&2; exit 1; }
for program in mmdebstrap unshare nsenter; do
    command -v $program >/dev/null || { echo "test-packages: $program is missing: apt install mmdebstrap" >&2; exit 1; }
done
room=$(mktemp -d -p /var/tmp ttmfs-packages-XXXXXX)
chmod 755 "$room"
machine= # the process that has the booted machine
shut_down() {
    [ -n "$machine" ] || return 0
    kill -KILL "$machine" 2>/dev/null || :
    wait "$machine" 2>/dev/null || :
    machine=
}
clean_up() {
    shut_down
    rm -rf --one-file-system "$room"
}
trap clean_up EXIT

part() { echo "--- $release: $*"; }

sources() { # RELEASE: lines for sources.list, from those of this machine
    # shellcheck disable=SC1091 # it says which release this machine has
    here=$(. /etc/os-release && echo "$VERSION_CODENAME")
    apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' 'Origin: Debian' |
        sed "s/ $here/ $1/" | sort -u
}

make_base() { # RELEASE FILE
    sources "$1" | mmdebstrap --quiet --variant=minbase --aptopt='APT::Sandbox::User "root"' \
        --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr "$1" "$2" - >"$room/log" 2>&1 || { cat "$room/log"; exit 1; }
}

make_chroot() { # BASE DIRECTORY: unpacked, with this machine's way to the network
    mkdir "$2"
    tar -xf "$1" -C "$2"
    cp -L /etc/resolv.conf "$2/etc/resolv.conf"
    echo 'APT::Sandbox::User "root";' >"$2/etc/apt/apt.conf.d/90test"
    for path in /etc/pip.conf /root/.config/pip; do
        [ ! -e "$path" ] || { mkdir -p "$2${path%/*}" && cp -rL "$path" "$2$path"; }
    done
    [ ! -e /etc/ssl/certs/ca-certificates.crt ] || cp -L /etc/ssl/certs/ca-certificates.crt "$2/root"
}

in_chroot() { # DIRECTORY COMMAND, with its own processes and mounts
    unshare --fork --pid --kill-child --mount --propagation private bash -c '
        mount -t proc proc "$0/proc"; mount --rbind /dev "$0/dev"; mount -t tmpfs tmpfs "$0/tmp"
        exec chroot "$0" env HOME=/root PIP_CERT=/root/ca-certificates.crt \
            REQUESTS_CA_BUNDLE=/root/ca-certificates.crt DEBIAN_FRONTEND=noninteractive bash -ec "$1"' "$@"
}

build() { # BASE: the package, in $room/out
    part "builds in a clean chroot"
    make_chroot "$1" "$room/build"
    git -c safe.directory='*' ls-files -z -co --exclude-standard | tar -c --null -T - --transform 's|^|ttmfs/|' |
        tar -x --no-same-owner -C "$room/build/root"
    in_chroot "$room/build" '
        apt-get update -qq
        apt-get install -qq --no-install-recommends dpkg-dev lintian >/dev/null 2>&1
        apt-get build-dep -qq --no-install-recommends /root/ttmfs/packaging >/dev/null 2>&1
        cd /root/ttmfs
        scripts/deb.sh >/root/log 2>&1 || { tail -50 /root/log; exit 1; }
        tail -1 /root/log'
    part "lintian"
    in_chroot "$room/build" 'lintian --allow-root --fail-on error,warning --pedantic /root/ttmfs/dist/*.changes'
    mkdir "$room/out"
    cp "$room"/build/root/ttmfs/dist/*.deb "$room/out"
    rm -rf --one-file-system "$room/build"
}

boot() { # DIRECTORY: starts systemd in it
    unshare --fork --pid --kill-child --mount --cgroup --uts --ipc bash -c '
        mount --make-rprivate /
        mount --bind "$0" "$0"
        cd "$0"
        mount -t proc proc proc; mount --rbind /sys sys; mount --rbind /dev dev
        mount -t cgroup2 cgroup sys/fs/cgroup # systemd 257 starts on no other
        for place in run tmp var/log; do mount -t tmpfs tmpfs $place; done
        mkdir .before
        pivot_root . .before
        umount -l /.before
        rmdir /.before
        export container=other
        exec /lib/systemd/systemd --unit=multi-user.target --log-target=journal --show-status=no' "$1" &
    machine=$!
    for _ in $(seq 120); do
        init=$(tr -d ' ' <"/proc/$machine/task/$machine/children") # only the one
        [ -z "$init" ] || case $(inside 'systemctl is-system-running || :' 2>/dev/null) in
        running | degraded) return ;;
        esac
        sleep 0.5
    done
    echo "systemd did not come up" >&2
    exit 1
}

inside() { # COMMAND, in the booted machine
    nsenter -t "$init" -a env -i -C / HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive \
        bash -euo pipefail -c "$1"
}

files() { # the files of the machine, without those of apt, dpkg and running programs
    inside "find / -xdev ! -path '/var/lib/apt/*' ! -path '/var/lib/dpkg/*' ! -path '/var/cache/*' ! -path '/deb/*' \
        ! -name __pycache__ ! -name '*.pyc' | sort"
}

try() { # BASE: the built package
    part "boots a clean machine"
    make_chroot "$1" "$room/machine"
    mkdir "$room/machine/deb"
    in_chroot "$room/machine" '
        rm /etc/dpkg/dpkg.cfg.d/* 2>/dev/null || :
        apt-get update -qq
        apt-get install -qq --no-install-recommends systemd systemd-sysv dbus procps man-db attr \
            fuse3 python3-numpy >/dev/null 2>&1
        rm -f /etc/systemd/system/multi-user.target.wants/*
        for unit in getty.target systemd-logind.service systemd-modules-load.service systemd-tmpfiles-setup.service \
            systemd-udevd.service; do ln -s /dev/null /etc/systemd/system/$unit; done'
    cp "$room"/out/*.deb "$room/machine/deb"
    mv "$room"/machine/deb/ttmfs_*.deb "$room/machine/deb/first.deb"
    dpkg-deb -R "$room/machine/deb/first.deb" "$room/machine/deb/next"
    sed -i 's/^Version: .*/&.1/' "$room/machine/deb/next/DEBIAN/control"
    dpkg-deb --root-owner-group -b "$room/machine/deb/next" "$room/machine/deb/next.deb" >/dev/null
    boot "$room/machine"
    files >"$room/before"

    part "installs"
    inside 'apt-get install -y -qq --no-install-recommends /deb/first.deb >/tmp/log 2>&1 || { cat /tmp/log; exit 1; }'
    inside 'ttmfs --version; dpkg -V ttmfs; test -d /etc/ttmfs; man -w 1 ttmfs 5 ttmfs 8 mount.ttmfs 8 mount.fuse.ttmfs
        cd /usr/share
        for file in bash-completion/completions/ttmfs zsh/vendor-completions/_ttmfs fish/vendor_completions.d/ttmfs.fish
        do test -s $file; done
        test -z "$(systemctl list-units --plain --no-legend "ttmfs@*")"'
    part "mounts, stores a page and reads it back"
    inside "$(cat packaging/debian/tests/smoke)" >"$room/smoke" 2>&1 || { cat "$room/smoke"; exit 1; }

    part "upgrades with live mounts"
    inside 'mkdir /mnt/ttm /mnt/two
        echo OPTIONS=size=64m,allow_other >/etc/ttmfs/mnt-ttm.conf
        systemctl enable -q --now ttmfs@mnt-ttm
        mount -t ttmfs ttm /mnt/two -o size=16m
        for mnt in /mnt/ttm /mnt/two; do mkdir $mnt/a; head -c 4096 /bin/ls >$mnt/a/7; done
        systemctl show -P MainPID ttmfs@mnt-ttm >/tmp/keeper
        grep daemon_pid /mnt/two/.config >/tmp/daemon'
    inside 'exec 3</mnt/ttm/a/7
        apt-get install -y -qq --no-install-recommends /deb/next.deb >/tmp/log 2>&1 || { cat /tmp/log; exit 1; }
        test "$(systemctl show -P MainPID ttmfs@mnt-ttm)" != "$(cat /tmp/keeper)"
        ! grep daemon_pid /mnt/two/.config | cmp -s - /tmp/daemon
        cmp /dev/fd/3 <(head -c 4096 /bin/ls)
        for mnt in /mnt/ttm /mnt/two; do cmp $mnt/a/7 <(head -c 4096 /bin/ls); done'

    part "is not removed while mounts hold pages"
    inside 'if apt-get remove -y -qq ttmfs >/tmp/said 2>&1; then echo removed; exit 1; fi
        grep -q "these mounts hold pages: /mnt/ttm /mnt/two" /tmp/said || { cat /tmp/said; exit 1; }
        for mnt in /mnt/ttm /mnt/two; do cmp $mnt/a/7 <(head -c 4096 /bin/ls); done
        systemctl is-active ttmfs@mnt-ttm >/dev/null'
    part "is purged, and nothing is left"
    inside 'systemctl stop ttmfs@mnt-ttm; umount /mnt/two; rmdir /mnt/ttm /mnt/two
        apt-get purge -y -qq ttmfs >/dev/null
        for _ in $(seq 100); do # umount(8) does not wait for the daemon, nor the manager for the end of a unit
            left=$(systemctl list-units --plain --no-legend "ttmfs@*"; pgrep -af "[l]ib/ttmfs/") || :
            [ -n "$left" ] || exit 0
            sleep 0.1
        done
        echo "left: $left"; exit 1'
    files >"$room/after"
    diff "$room/before" "$room/after"
    shut_down
    rm -rf --one-file-system "$room/machine"
}

[ $# -gt 0 ] || set -- bookworm trixie
for release; do
    make_base "$release" "$room/base.tar"
    build "$room/base.tar"
    try "$room/base.tar"
    rm -rf "$room/out" "$room/base.tar"
    part "passed"
done
