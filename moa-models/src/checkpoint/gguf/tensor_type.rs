use moa_core::{BlockType, Dtype};

/// How a tensor's elements are stored in a GGUF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorType {
    /// One after the other, as numbers.
    Plain(Dtype),
    /// Several together, quantised.
    Blocks(BlockType),
}

impl From<Dtype> for TensorType {
    fn from(dtype: Dtype) -> Self {
        Self::Plain(dtype)
    }
}

impl From<BlockType> for TensorType {
    fn from(blocks: BlockType) -> Self {
        Self::Blocks(blocks)
    }
}

/// The types that can be read: GGUF's number and name, the number of a file whose matrices are of it, and the type.
const READ: [(u32, &str, u32, TensorType); 11] = [
    (0, "F32", 0, TensorType::Plain(Dtype::F32)),
    (1, "F16", 1, TensorType::Plain(Dtype::F16)),
    (30, "BF16", 32, TensorType::Plain(Dtype::Bf16)),
    (8, "Q8_0", 7, TensorType::Blocks(BlockType::Q8_0)),
    (2, "Q4_0", 2, TensorType::Blocks(BlockType::Q4_0)),
    (3, "Q4_1", 3, TensorType::Blocks(BlockType::Q4_1)),
    (6, "Q5_0", 8, TensorType::Blocks(BlockType::Q5_0)),
    (7, "Q5_1", 9, TensorType::Blocks(BlockType::Q5_1)),
    (12, "Q4_K", 14, TensorType::Blocks(BlockType::Q4K)),
    (13, "Q5_K", 16, TensorType::Blocks(BlockType::Q5K)),
    (14, "Q6_K", 18, TensorType::Blocks(BlockType::Q6K)),
];

/// Types that exist and cannot be read, for the message.
const OTHERS: [(u32, &str); 21] = [
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

impl TensorType {
    pub(super) fn from_number(number: u32) -> Option<Self> {
        READ.iter().find(|(id, ..)| *id == number).map(|(.., kind)| *kind)
    }

    /// GGUF's number of the type.
    pub(super) fn number(self) -> u32 {
        self.entry().0
    }

    /// GGUF's name of the type.
    pub(super) fn name(self) -> &'static str {
        self.entry().1
    }

    /// What llama.cpp calls a file whose matrices are of the type.
    pub(super) fn file_type(self) -> u32 {
        self.entry().2
    }

    fn entry(self) -> (u32, &'static str, u32) {
        let own = READ.iter().find(|(.., kind)| *kind == self);
        own.map_or((u32::MAX, "another type", u32::MAX), |(number, name, file, _)| {
            (*number, name, *file)
        })
    }

    /// The types that can be read, for a message.
    pub(super) fn known() -> String {
        READ.map(|(_, name, ..)| name).join(", ")
    }

    /// A type by its name, or by its number where it has none.
    pub(super) fn name_of(number: u32) -> String {
        let read = READ.iter().map(|(id, name, ..)| (id, name));
        let mut all = read.chain(OTHERS.iter().map(|(id, name)| (id, name)));
        match all.find(|(id, _)| **id == number) {
            Some((_, name)) => (*name).to_owned(),
            None => format!("type {number}"),
        }
    }

    /// Elements that are stored together; a row is a multiple of it.
    pub(super) fn block_len(self) -> usize {
        match self {
            Self::Plain(_) => 1,
            Self::Blocks(blocks) => blocks.block_len(),
        }
    }

    /// Bytes of those elements.
    pub(super) fn block_bytes(self) -> usize {
        match self {
            Self::Plain(dtype) => dtype.bytes(),
            Self::Blocks(blocks) => blocks.block_bytes(),
        }
    }
}
