//! SIMD building blocks, written once over pulp's `Simd` and inlined into kernels that are compiled
//! for each instruction set.

pub(crate) mod dot;
pub(crate) mod exp2;
pub(crate) mod outer;
pub(crate) mod transpose;
pub(crate) mod whole;

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

#[cfg(not(test))]
fn arch() -> pulp::Arch {
    pulp::Arch::new()
}

#[cfg(test)]
pub(crate) use tests::arch;

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;

    use pulp::Arch;

    thread_local! {
        static ARCH: Cell<Arch> = Cell::new(Arch::new());
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
        ARCH.set(Arch::new());
        results
    }
}
