//! A `tokenizer.model` of SentencePiece: pieces with scores, and how a text is normalised, as a protocol buffer.

use serde_json::{Value as Json, json};

use crate::checkpoint::gguf::sentencepiece;

/// Types of pieces; that of control pieces lies between the unknown one's and that of the user's.
const NORMAL: u64 = 1;
const UNKNOWN: u64 = 2;
const USER_DEFINED: u64 = 4;
const BYTE: u64 = 6;

/// What a model says, with the format's defaults for what it leaves out.
#[derive(Debug)]
pub(crate) struct SentencePieceModel {
    pieces: Vec<Piece>,
    is_bpe: bool,
    byte_fallback: bool,
    /// Begin, end, unknown and padding pieces.
    roles: [i64; 4],
    space_prefix: bool,
    merges_spaces: bool,
    character_map: Vec<u8>,
}

#[derive(Debug)]
struct Piece {
    text: String,
    score: f32,
    kind: u64,
}

/// A field of a message.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Float(f32),
}

/// The fields of a message by their numbers, or nothing where it ends within one.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 127) << shift;
            if byte & 128 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Option<(u64, Field<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let mut field = || {
            let key = self.varint()?;
            let value = match key & 7 {
                0 => Field::Number(self.varint()?),
                1 => Field::Bytes(self.take(8)?),
                2 => {
                    let len = self.varint()?.try_into().ok()?;
                    Field::Bytes(self.take(len)?)
                }
                5 => Field::Float(f32::from_le_bytes(self.take(4)?.try_into().ok()?)),
                _ => return None,
            };
            Some((key >> 3, value))
        };
        let field = field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field)
    }
}

impl SentencePieceModel {
    /// Reads a model; `None` if the bytes are none.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let mut model = Self {
            pieces: Vec::new(),
            is_bpe: false,
            byte_fallback: false,
            roles: [1, 2, 0, -1],
            space_prefix: true,
            merges_spaces: true,
            character_map: Vec::new(),
        };
        for field in Fields(bytes) {
            match field? {
                (1, Field::Bytes(piece)) => model.pieces.push(Piece::parse(piece)?),
                (2, Field::Bytes(trainer)) => model.trainer(trainer)?,
                (3, Field::Bytes(normalizer)) => model.normalizer(normalizer)?,
                _ => {}
            }
        }
        (!model.pieces.is_empty()).then_some(model)
    }

    /// Checks that every piece that text is merged to is short enough; `Err` names one that is not.
    pub(crate) fn check(&self) -> Result<(), String> {
        // Unigram pieces are looked up, not put together.
        let merged = self.pieces.iter().enumerate().filter(|(_, p)| self.is_bpe && p.is_merged());
        match sentencepiece::too_long(merged.map(|(id, piece)| (id, piece.text.as_str()))) {
            Some(got) => {
                let most = sentencepiece::MOST_BYTES;
                Err(format!("expected pieces of at most {most} bytes, got {got}"))
            }
            None => Ok(()),
        }
    }

    fn trainer(&mut self, bytes: &[u8]) -> Option<()> {
        for field in Fields(bytes) {
            match field? {
                (3, Field::Number(kind)) => self.is_bpe = kind == 2,
                (35, Field::Number(flag)) => self.byte_fallback = flag != 0,
                (40, Field::Number(id)) => self.roles[2] = id as i32 as i64,
                (41, Field::Number(id)) => self.roles[0] = id as i32 as i64,
                (42, Field::Number(id)) => self.roles[1] = id as i32 as i64,
                (43, Field::Number(id)) => self.roles[3] = id as i32 as i64,
                _ => {}
            }
        }
        Some(())
    }

    fn normalizer(&mut self, bytes: &[u8]) -> Option<()> {
        for field in Fields(bytes) {
            match field? {
                (2, Field::Bytes(map)) => self.character_map = map.to_owned(),
                (3, Field::Number(flag)) => self.space_prefix = flag != 0,
                (4, Field::Number(flag)) => self.merges_spaces = flag != 0,
                _ => {}
            }
        }
        Some(())
    }

    /// The pieces of the roles that tokens have.
    pub(crate) fn roles(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let names = ["bos_token", "eos_token", "unk_token", "pad_token"];
        let text = |id: i64| self.pieces.get(usize::try_from(id).ok()?).map(|p| p.text.as_str());
        names.into_iter().zip(self.roles).filter_map(move |(name, id)| Some((name, text(id)?)))
    }

    /// What `tokenizer.json` would say; `ends` are the begin and end tokens that texts get.
    pub(crate) fn to_json(&self, ends: [bool; 2]) -> Json {
        let is_added = |piece: &Piece| matches!(piece.kind, UNKNOWN..=USER_DEFINED);
        let added = self.pieces.iter().enumerate().filter(|(_, piece)| is_added(piece));
        let added = added.map(|(id, piece)| {
            json!({"id": id, "content": piece.text, "special": piece.kind != USER_DEFINED,
                "normalized": false, "single_word": false, "lstrip": false, "rstrip": false})
        });
        json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": added.collect::<Vec<_>>(),
            "normalizer": self.normalizer_json(), "pre_tokenizer": null,
            "post_processor": self.post_processor(ends),
            "decoder": sentencepiece::decoder(self.space_prefix), "model": self.model(),
        })
    }

    fn model(&self) -> Json {
        let unknown = self.pieces.iter().position(|piece| piece.kind == UNKNOWN);
        if !self.is_bpe {
            let pieces: Vec<_> = self.pieces.iter().map(|p| json!([p.text, p.score])).collect();
            return json!({"type": "Unigram", "unk_id": unknown, "vocab": pieces,
                "byte_fallback": self.byte_fallback});
        }
        let mut ids = serde_json::Map::new();
        for (id, piece) in self.pieces.iter().enumerate() {
            ids.entry(&piece.text).or_insert(json!(id));
        }
        let merged = self.pieces.iter().filter(|piece| piece.is_merged());
        let merged: Vec<_> = merged.map(|p| (p.text.as_str(), p.score)).collect();
        json!({
            "type": "BPE", "dropout": null, "unk_token": unknown.map(|id| &self.pieces[id].text),
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": self.byte_fallback || self.pieces.iter().any(|p| p.kind == BYTE),
            "ignore_merges": false, "vocab": ids, "merges": sentencepiece::merges(&merged),
        })
    }

    fn normalizer_json(&self) -> Json {
        let mut steps = Vec::new();
        if !self.character_map.is_empty() {
            let map = base64(&self.character_map);
            steps.push(json!({"type": "Precompiled", "precompiled_charsmap": map}));
        }
        if self.merges_spaces {
            // Spaces alone: lines and tabs at the ends of a text are kept, which `Strip` would take.
            for (regex, content) in [(r"\A +| +\z", ""), (" {2,}", " ")] {
                let pattern = json!({"Regex": regex});
                steps.push(json!({"type": "Replace", "pattern": pattern, "content": content}));
            }
        }
        if let Json::Array(own) = sentencepiece::normalizer(self.space_prefix)["normalizers"].take()
        {
            steps.extend(own);
        }
        json!({"type": "Sequence", "normalizers": steps})
    }

    fn post_processor(&self, [bos, eos]: [bool; 2]) -> Json {
        let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
        let special = |role: usize, wanted: bool| {
            let id = usize::try_from(self.roles[role]).ok().filter(|_| wanted)?;
            Some((id, self.pieces.get(id)?.text.as_str()))
        };
        let ends = [special(0, bos), special(1, eos)];
        let piece = |end: Option<(usize, &str)>| {
            end.map(|(_, text)| json!({"SpecialToken": {"id": text, "type_id": 0}}))
        };
        let around = |texts: Vec<Json>| {
            piece(ends[0]).into_iter().chain(texts).chain(piece(ends[1])).collect::<Vec<_>>()
        };
        let tokens = ends.iter().flatten().map(|(id, text)| {
            (text.to_string(), json!({"id": text, "ids": [id], "tokens": [text]}))
        });
        json!({
            "type": "TemplateProcessing", "single": around(vec![text("A")]),
            "pair": around(vec![text("A"), text("B")]),
            "special_tokens": tokens.collect::<serde_json::Map<_, _>>(),
        })
    }
}

impl Piece {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut piece = Self { text: String::new(), score: 0.0, kind: NORMAL };
        for field in Fields(bytes) {
            match field? {
                (1, Field::Bytes(text)) => piece.text = std::str::from_utf8(text).ok()?.to_owned(),
                (2, Field::Float(score)) => piece.score = score,
                (3, Field::Number(kind)) => piece.kind = kind,
                _ => {}
            }
        }
        Some(piece)
    }

    /// Whether text is merged to it.
    fn is_merged(&self) -> bool {
        matches!(self.kind, NORMAL | USER_DEFINED)
    }
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let byte = |i: usize| u32::from(three.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for digit in 0..4 {
            let own = char::from(DIGITS[(bits >> (18 - 6 * digit) & 63) as usize]);
            text.push(if digit <= three.len() { own } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_every_length() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }

    /// A field of bytes.
    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, bytes.len() as u8], bytes].concat()
    }

    #[test]
    fn spaces_are_merged_and_taken_off_the_ends_and_nothing_else_is() {
        let pieces =
            [("<unk>", 2, 0.0), ("▁", 1, -2.0), ("a", 1, -3.0), ("\n", 1, -4.0), ("▁a", 1, -1.0)];
        let piece = |(text, kind, score): (&str, u8, f32)| {
            let score = [&[2 << 3 | 5], &score.to_le_bytes()[..]].concat();
            field(1, &[field(1, text.as_bytes()), score, vec![3 << 3, kind]].concat())
        };
        let mut bytes = pieces.map(piece).concat();
        // Merges of pairs.
        bytes.extend(field(2, &[3 << 3, 2]));
        let model = SentencePieceModel::parse(&bytes).unwrap();
        let json = model.to_json([false; 2]).to_string();
        let tokenizer = crate::checkpoint::tokenizer_file::parse(json.as_bytes()).unwrap();
        // As the library does.
        for (text, ids) in [
            ("\na\n", &[1, 3, 2, 3][..]),
            ("  a   a ", &[4, 4]),
            (" \n a", &[1, 3, 4]),
            ("a \n ", &[4, 1, 3]),
        ] {
            assert_eq!(tokenizer.encode_fast(text, false).unwrap().get_ids(), ids, "{text:?}");
        }
    }

    #[test]
    fn what_is_cut_off_or_no_model_is_none() {
        // One piece, `a`.
        let whole = [10, 3, 10, 1, b'a'];
        assert!(SentencePieceModel::parse(&whole).is_some());
        for len in 0..whole.len() {
            assert!(SentencePieceModel::parse(&whole[..len]).is_none());
        }
        // Other files of that name: ranks of tokens as text.
        assert!(SentencePieceModel::parse(b"IQ== 0\nIg== 1\n").is_none());
        assert!(SentencePieceModel::parse(&[0x82, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]).is_none());
    }

    #[test]
    fn a_piece_that_is_too_long_to_merge_is_named() {
        // A message's length in two bytes.
        let long = |number: u8, bytes: &[u8]| {
            let len = bytes.len();
            [&[number << 3 | 2, len as u8 & 127 | 128, (len >> 7) as u8], bytes].concat()
        };
        let model = |len: usize, is_bpe: bool| {
            let unknown = field(1, &[field(1, b"<unk>"), vec![3 << 3, UNKNOWN as u8]].concat());
            let piece = long(1, &long(1, "é".repeat(len / 2).as_bytes()));
            let trainer = field(2, &[3 << 3, 1 + u8::from(is_bpe)]);
            SentencePieceModel::parse(&[unknown, piece, trainer].concat()).unwrap()
        };
        assert_eq!(model(512, true).check(), Ok(()));
        let reason = model(600, true).check().unwrap_err();
        assert!(reason.contains("piece 1") && reason.contains("`ééé"), "{reason}");
        assert!(reason.contains("600 bytes") && reason.contains("at most 512"), "{reason}");
        assert!(reason.len() < 200, "{reason}");
        // Unigram pieces need no merges.
        let unigram = model(600, false);
        assert_eq!(unigram.check(), Ok(()));
        let json = unigram.to_json([false; 2]).to_string();
        let tokenizer = crate::checkpoint::tokenizer_file::parse(json.as_bytes()).unwrap();
        let ids = tokenizer.encode_fast("é".repeat(300), false).unwrap();
        assert!(!ids.get_ids().is_empty());
    }
}
