use moa_core::{BlockType, Dtype};

/// How a tensor's elements are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Plain(Dtype),
    Blocks(BlockType),
}

/// GGUF's numbers and names of the types that can be read.
const READ: [(u32, &str, Kind); 11] = [
    (0, "F32", Kind::Plain(Dtype::F32)),
    (1, "F16", Kind::Plain(Dtype::F16)),
    (30, "BF16", Kind::Plain(Dtype::Bf16)),
    (8, "Q8_0", Kind::Blocks(BlockType::Q8_0)),
    (2, "Q4_0", Kind::Blocks(BlockType::Q4_0)),
    (3, "Q4_1", Kind::Blocks(BlockType::Q4_1)),
    (6, "Q5_0", Kind::Blocks(BlockType::Q5_0)),
    (7, "Q5_1", Kind::Blocks(BlockType::Q5_1)),
    (12, "Q4_K", Kind::Blocks(BlockType::Q4K)),
    (13, "Q5_K", Kind::Blocks(BlockType::Q5K)),
    (14, "Q6_K", Kind::Blocks(BlockType::Q6K)),
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

impl Kind {
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

    fn entry(self) -> (u32, &'static str) {
        let own = READ.iter().find(|(.., kind)| *kind == self);
        own.map_or((u32::MAX, "another type"), |(number, name, _)| (*number, name))
    }

    /// The types that can be read, for a message.
    pub(super) fn known() -> String {
        READ.map(|(_, name, _)| name).join(", ")
    }

    /// A type by its name, or by its number where it has none.
    pub(super) fn name_of(number: u32) -> String {
        let read = READ.iter().map(|(id, name, _)| (id, name));
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
