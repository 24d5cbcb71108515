/// A colour by its job, so that a page can restyle every shape for its theme.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tone {
    /// Behind everything.
    Paper,
    /// Text.
    Ink,
    /// Text and marks of second rank.
    Soft,
    /// Grid lines and frames.
    Line,
    /// The first series; blue.
    First,
    /// The second series; orange, which all kinds of colour blindness tell from blue.
    Second,
    /// Share 0 of a sequential scale.
    Low,
    /// Share 1 of a sequential scale. One hue that only changes in lightness, so that the order shows
    /// without colour vision and in print.
    High,
}

impl Tone {
    /// Every tone.
    pub(crate) const ALL: [Self; 8] = [
        Self::Paper,
        Self::Ink,
        Self::Soft,
        Self::Line,
        Self::First,
        Self::Second,
        Self::Low,
        Self::High,
    ];

    /// Name of the tone's CSS variable.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Paper => "paper",
            Self::Ink => "ink",
            Self::Soft => "soft",
            Self::Line => "line",
            Self::First => "first",
            Self::Second => "second",
            Self::Low => "low",
            Self::High => "high",
        }
    }

    /// RGB on a light page, and in an SVG that stands alone.
    pub(crate) fn light(self) -> [u8; 3] {
        match self {
            Self::Paper => [255, 255, 255],
            Self::Ink => [27, 31, 36],
            Self::Soft => [87, 96, 106],
            Self::Line => [208, 215, 222],
            Self::First => [11, 92, 173],
            Self::Second => [190, 82, 8],
            Self::Low => [233, 240, 250],
            Self::High => [8, 48, 107],
        }
    }

    /// RGB on a dark page.
    pub(crate) fn dark(self) -> [u8; 3] {
        match self {
            Self::Paper => [13, 17, 23],
            Self::Ink => [240, 246, 252],
            Self::Soft => [157, 167, 179],
            Self::Line => [48, 54, 61],
            Self::First => [88, 166, 255],
            Self::Second => [240, 136, 62],
            Self::Low => [20, 28, 40],
            Self::High => [130, 190, 255],
        }
    }

    /// `#rrggbb` on a light page.
    pub(crate) fn hex(self) -> String {
        hex(self.light())
    }
}

/// `#rrggbb`.
pub(crate) fn hex([r, g, b]: [u8; 3]) -> String {
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// Colour of a share of the sequential scale on a light page: linear in RGB between its ends.
pub(crate) fn shade(share: f64) -> String {
    let share = share.clamp(0.0, 1.0);
    let (low, high) = (Tone::Low.light(), Tone::High.light());
    let mix = |i: usize| f64::from(low[i]) + (f64::from(high[i]) - f64::from(low[i])) * share;
    hex([0, 1, 2].map(|i| mix(i).round() as u8))
}

/// The tone of text that is read on a cell of that share, in both themes.
pub(crate) fn on_shade(share: f64) -> Tone {
    if share > 0.55 { Tone::Paper } else { Tone::Ink }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shades_run_from_low_to_high() {
        assert_eq!(shade(0.0), Tone::Low.hex());
        assert_eq!(shade(1.0), Tone::High.hex());
        assert_eq!(shade(7.0), shade(1.0));
    }

    /// Contrast as WCAG 2 defines it.
    fn contrast(a: [u8; 3], b: [u8; 3]) -> f64 {
        let luminance = |rgb: [u8; 3]| {
            let linear = rgb.map(|c| {
                let c = f64::from(c) / 255.0;
                if c <= 0.04045 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) }
            });
            0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05
        };
        let (a, b) = (luminance(a), luminance(b));
        a.max(b) / a.min(b)
    }

    #[test]
    fn text_stands_out_from_what_is_behind_it() {
        for theme in [Tone::light, Tone::dark] {
            for tone in [Tone::Ink, Tone::Soft, Tone::First, Tone::Second] {
                let seen = contrast(theme(tone), theme(Tone::Paper));
                assert!(seen >= 4.5, "{tone:?} {seen}");
            }
            for step in 0..=20 {
                let share = f64::from(step) / 20.0;
                let (low, high) = (theme(Tone::Low), theme(Tone::High));
                let mix = |i: usize| f64::from(low[i]) * (1.0 - share) + f64::from(high[i]) * share;
                let seen = contrast(theme(on_shade(share)), [0, 1, 2].map(|i| mix(i) as u8));
                assert!(seen >= 4.0, "share {share}: {seen}");
            }
        }
    }
}
