//! Running text that every model can be shown.

/// The first chapters of "Erewhon" by Samuel Butler (1872), without their headings; a line is a
/// paragraph, and all of it is ASCII. The book is in the public domain.
pub(crate) const BOOK: &str = include_str!("erewhon.txt");
