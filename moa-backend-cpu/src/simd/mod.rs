//! SIMD building blocks, written once over pulp's `Simd` and inlined into kernels that are compiled
//! for each instruction set.

pub(crate) mod dot;
pub(crate) mod exp2;
pub(crate) mod outer;
pub(crate) mod transpose;
pub(crate) mod whole;

#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

/// Runs an operation with the best instruction set of this machine.
pub(crate) fn dispatch<O: pulp::WithSimd>(op: O) -> O::Output {
    arch().dispatch(op)
}

/// Whether code for `S` is code for AVX-512 (F, BW, CD, DQ and VL), which the machine then has.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn is_avx512<S: 'static>() -> bool {
    std::any::TypeId::of::<S>() == std::any::TypeId::of::<pulp::x86::V4>()
}

/// Whether [`dispatch`] takes AVX-512.
pub(crate) fn has_avx512() -> bool {
    #[cfg(target_arch = "x86_64")]
    return matches!(arch(), pulp::Arch::V4(_));
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Bytes between what a kernel reads and what it asks memory for. A processor that looks ahead by itself stops at the
/// end of a page and begins anew.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 4096;

/// Asks for the lines of so many bytes, some way ahead of where weights, keys or values are read in one stream.
#[inline(always)]
pub(crate) fn prefetch<T>(read: *const T, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    ask::<{ std::arch::x86_64::_MM_HINT_T1 }, T>(read, bytes);
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (read, bytes);
}

/// [`prefetch`] into the first level, for what is read in several streams, which processors do not look ahead in.
#[inline(always)]
pub(crate) fn prefetch_near<T>(read: *const T, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    ask::<{ std::arch::x86_64::_MM_HINT_T0 }, T>(read, bytes);
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (read, bytes);
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn ask<const LEVEL: i32, T>(read: *const T, bytes: usize) {
    for line in (0..bytes).step_by(64) {
        // SAFETY: every x86-64 has it, and where there is no memory it does nothing.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<LEVEL>(read.cast::<i8>().wrapping_add(AHEAD + line));
        }
    }
}

/// The best instruction set of this machine that may be used.
fn best() -> pulp::Arch {
    #[cfg(target_arch = "x86_64")]
    if !allows_avx512() {
        return pulp::x86::V3::try_new().map_or(pulp::Arch::Scalar, pulp::Arch::V3);
    }
    pulp::Arch::new()
}

/// Whether AVX-512 may be used where the machine has it: it may not where the variable `MOA_NO_AVX512` is set.
#[cfg(target_arch = "x86_64")]
pub(crate) fn allows_avx512() -> bool {
    static ALLOWS: OnceLock<bool> = OnceLock::new();
    *ALLOWS.get_or_init(|| !is_set("MOA_NO_AVX512"))
}

/// Whether a variable of the environment is set, to anything but 0 or nothing.
#[cfg(target_arch = "x86_64")]
pub(crate) fn is_set(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|said| !said.is_empty() && said != "0")
}

/// Whether the machine multiplies pairs of bf16 (AVX-512 BF16) and may do so.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_bf16_pairs() -> bool {
    allows_avx512() && is_x86_feature_detected!("avx512bf16")
}

#[cfg(not(test))]
use best as arch;

#[cfg(test)]
pub(crate) use tests::arch;

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;

    use pulp::Arch;

    thread_local! {
        static ARCH: Cell<Arch> = Cell::new(super::best());
    }

    pub(crate) fn arch() -> Arch {
        ARCH.get()
    }

    /// Every instruction set that this machine can run, and none.
    #[cfg(target_arch = "x86_64")]
    fn every() -> Vec<Arch> {
        let v3 = pulp::x86::V3::try_new().map(Arch::V3);
        let v4 = pulp::x86::V4::try_new().map(Arch::V4);
        [Some(Arch::Scalar), v3, v4].into_iter().flatten().collect()
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn every() -> Vec<Arch> {
        vec![Arch::Scalar, Arch::new()]
    }

    /// Results of the same code on each of them. What is handed to other threads runs with the best.
    pub(crate) fn on_every_arch<R>(run: impl Fn() -> R) -> Vec<R> {
        let results = every().into_iter().map(|arch| {
            ARCH.set(arch);
            run()
        });
        let results = results.collect();
        ARCH.set(super::best());
        results
    }
}
