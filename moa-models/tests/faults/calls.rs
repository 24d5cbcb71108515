//! The calls of the system that read and change files, in place of the C library's: a program's own functions come first.
//! One of a thread's calls fails as it is told to.

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_long, c_void};
use std::os::unix::fs::MetadataExt;
use std::sync::LazyLock;

use libc::{
    AT_FDCWD, AT_REMOVEDIR, EINTR, EIO, ENOSPC, S_IFMT, S_IFREG, mode_t, off64_t, size_t, ssize_t,
};

/// What happens at a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// No room.
    Full,
    /// The disk fails.
    Broken,
    /// Half is read or written, and then there is no room.
    Half,
    /// Half is read or written, which is no failure.
    Less,
    /// A signal comes in between, which is no failure of a read or a write.
    Interrupted,
    /// The process ends: half is written, and no later call does anything.
    Killed,
}

impl Fault {
    pub(crate) const ALL: [Self; 6] =
        [Self::Full, Self::Broken, Self::Half, Self::Less, Self::Interrupted, Self::Killed];
}

thread_local! {
    /// The fault to come and the calls until it, this thread's.
    static NEXT: Cell<Option<(Fault, u64)>> = const { Cell::new(None) };
    static CALLS: Cell<u64> = const { Cell::new(0) };
    static IS_DEAD: Cell<bool> = const { Cell::new(false) };
}

/// Runs with a fault at call number `at`, counted from 1; returns whether there were as many calls as well.
pub(crate) fn with_fault<T>(fault: Fault, at: u64, run: impl FnOnce() -> T) -> (T, bool) {
    CALLS.set(0);
    NEXT.set(Some((fault, at)));
    let result = run();
    NEXT.set(None);
    IS_DEAD.set(false);
    (result, CALLS.get() >= at)
}

/// How many calls there are.
pub(crate) fn count(run: impl FnOnce()) -> u64 {
    with_fault(Fault::Full, u64::MAX, run);
    CALLS.get()
}

/// What is to become of this call.
fn now() -> Option<Fault> {
    let (fault, at) = NEXT.get()?;
    if IS_DEAD.get() {
        return Some(Fault::Broken);
    }
    CALLS.set(CALLS.get() + 1);
    (CALLS.get() == at).then(|| {
        IS_DEAD.set(fault == Fault::Killed);
        fault
    })
}

/// Whether it lies on a disk, and not in `/proc`, where a process looks for its memory.
fn is_plain(file: c_int) -> bool {
    static OF_PROCESSES: LazyLock<u64> =
        LazyLock::new(|| std::fs::metadata("/proc/self/stat").map_or(0, |found| found.dev()));
    // SAFETY: zeros are a value of the struct, which is written.
    let mut found: libc::stat64 = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    let is_found = unsafe { libc::fstat64(file, &raw mut found) } == 0;
    is_found && found.st_mode & S_IFMT == S_IFREG && found.st_dev != *OF_PROCESSES
}

fn fail(error: c_int) -> c_int {
    // SAFETY: the thread's own.
    unsafe { *libc::__errno_location() = error };
    -1
}

/// A call that does all or nothing.
fn whole(call: impl FnOnce() -> c_long) -> c_int {
    match now() {
        None | Some(Fault::Less) => call() as c_int,
        Some(Fault::Full | Fault::Half) => fail(ENOSPC),
        Some(Fault::Broken | Fault::Killed) => fail(EIO),
        Some(Fault::Interrupted) => fail(EINTR),
    }
}

/// A call that may do a part of its work.
fn parted(file: c_int, len: size_t, call: impl FnOnce(size_t) -> c_long) -> ssize_t {
    let fault = if is_plain(file) { now() } else { None };
    match fault {
        None => call(len) as ssize_t,
        Some(Fault::Less) => call(len.div_ceil(2)) as ssize_t,
        Some(Fault::Full) => fail(ENOSPC) as ssize_t,
        Some(Fault::Broken) => fail(EIO) as ssize_t,
        Some(Fault::Interrupted) => fail(EINTR) as ssize_t,
        Some(half @ (Fault::Half | Fault::Killed)) => {
            call(len / 2);
            fail(if half == Fault::Half { ENOSPC } else { EIO }) as ssize_t
        }
    }
}

// SAFETY of all below: they are the C library's functions, by its own names and types.

#[unsafe(no_mangle)]
unsafe extern "C" fn write(file: c_int, from: *const c_void, len: size_t) -> ssize_t {
    parted(file, len, |len| unsafe { libc::syscall(libc::SYS_write, file, from, len) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn read(file: c_int, to: *mut c_void, len: size_t) -> ssize_t {
    parted(file, len, |len| unsafe { libc::syscall(libc::SYS_read, file, to, len) })
}

// The C library's takes `mode` as one more argument, which is passed alike.
#[unsafe(no_mangle)]
unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    let open = || unsafe { libc::syscall(libc::SYS_openat, AT_FDCWD, path, flags, mode) };
    if unsafe { CStr::from_ptr(path) }.to_bytes().starts_with(b"/proc/") {
        return open() as c_int;
    }
    whole(open)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fsync(file: c_int) -> c_int {
    whole(|| unsafe { libc::syscall(libc::SYS_fsync, file) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fdatasync(file: c_int) -> c_int {
    whole(|| unsafe { libc::syscall(libc::SYS_fdatasync, file) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ftruncate64(file: c_int, len: off64_t) -> c_int {
    whole(|| unsafe { libc::syscall(libc::SYS_ftruncate, file, len) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fchmod(file: c_int, mode: mode_t) -> c_int {
    whole(|| unsafe { libc::syscall(libc::SYS_fchmod, file, mode) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn flock(file: c_int, operation: c_int) -> c_int {
    whole(|| unsafe { libc::syscall(libc::SYS_flock, file, operation) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rename(from: *const c_char, to: *const c_char) -> c_int {
    whole(|| unsafe { libc::syscall(libc::SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn unlink(path: *const c_char) -> c_int {
    whole(|| unsafe { libc::syscall(libc::SYS_unlinkat, AT_FDCWD, path, 0) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rmdir(path: *const c_char) -> c_int {
    whole(|| unsafe { libc::syscall(libc::SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn mkdir(path: *const c_char, mode: mode_t) -> c_int {
    whole(|| unsafe { libc::syscall(libc::SYS_mkdirat, AT_FDCWD, path, mode) })
}

/// The functions above are the ones that files go through: else nothing here shows anything.
#[test]
fn files_go_through_these_calls() {
    let _alone = crate::world::alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let save = |bytes: &[u8]| moa_core::write_atomic(&path, bytes);
    let calls = count(|| save(b"old").unwrap());
    // Open, write, sync, rename, and the folder's open and sync.
    assert!(calls >= 6, "{calls}");
    let (failed, _) = with_fault(Fault::Full, 2, || save(b"new"));
    assert!(failed.is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    let (failed, _) = with_fault(Fault::Killed, 2, || save(b"new"));
    assert!(failed.is_err());
    // As a killed process leaves it: half of the new file, under a name of its own.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    let (read, happened) = with_fault(Fault::Broken, 2, || std::fs::read(&path));
    assert!(read.is_err() && happened, "{read:?}");
}
