//! Words in shared memory as the elements that they hold. SPIR-V loads a matrix of halves from words; CUDA C++ takes
//! a pointer to halves alone. CubeCL casts pointers itself where it changes the size of vectors, and has no function for
//! another element.

use cubecl::ir::Scope;
use cubecl::ir::interfaces::TypeExt;
use cubecl::ir::pliron::r#type::Typed;
use cubecl::ir::types::{ArrayType, PointerType};
use cubecl::prelude::*;
use cubecl::unexpanded;

use super::blocks::Words;

/// Words of a vector.
const WORDS: usize = 4;

pub(super) fn elements<E: Scalar>(_words: &[Words]) -> &[E] {
    unexpanded!()
}

pub(super) fn elements_mut<E: Scalar>(_words: &mut [Words]) -> &mut [E] {
    unexpanded!()
}

pub(super) mod elements {
    use super::*;

    pub(in super::super) fn expand<'a, E: Scalar>(
        scope: &Scope,
        words: &'a SliceExpand<Words>,
    ) -> &'a SliceExpand<E> {
        scope.create_kernel_ref(of(scope, words))
    }
}

pub(super) mod elements_mut {
    use super::*;

    pub(in super::super) fn expand<'a, E: Scalar>(
        scope: &Scope,
        words: &'a mut SliceExpand<Words>,
    ) -> &'a mut SliceExpand<E> {
        scope.create_kernel_ref(of(scope, words))
    }
}

fn of<E: Scalar>(scope: &Scope, words: &SliceExpand<Words>) -> SliceExpand<E> {
    let element = E::__expand_as_type(scope);
    let per_vector = WORDS * size_of::<u32>() / E::__expand_size(scope);
    let list = words.__extract_list(scope);
    let PointerType { inner, address_space } = list.get_type(scope.ctx()).as_ptr(scope.ctx());
    let length = {
        let array = inner.deref(scope.ctx());
        // Arrays in shared memory have a length.
        array.downcast_ref::<ArrayType>().expect("words in shared memory").length
    };
    let array = ArrayType::get(scope.ctx(), element, length * per_vector).into();
    let pointer = PointerType::get(scope.ctx(), array, address_space).into();
    let list = reinterpret_value(scope, list, pointer);
    let offset = words.__extract_offset(scope).__expand_mul_method(scope, per_vector.into());
    let length = words.__extract_length(scope).__expand_mul_method(scope, per_vector.into());
    from_raw_parts(scope, list, offset, length)
}
