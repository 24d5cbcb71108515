/// Widest column. A cell that is longer juts out; the other rows are not padded for it.
const WIDEST: usize = 200;

/// Lays rows out in columns: the first to the left, the others, which are numbers, to the right.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count()).min(WIDEST);
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (column, (cell, &width)) in cells.zip(&widths).enumerate() {
            // Not by a format's width, which may not be more than 65,535.
            let padding = " ".repeat(width.saturating_sub(cell.chars().count()));
            text.push_str(if column > 0 { "  " } else { "" });
            match column {
                0 => text.extend([cell, &padding]),
                _ => text.extend([padding.as_str(), cell]),
            }
        }
        text.trim_end().to_string()
    };
    let mut lines = vec![line(&mut head.iter().copied())];
    lines.push(widths.iter().map(|w| "-".repeat(*w)).collect::<Vec<_>>().join("  "));
    lines.extend(rows.iter().map(|row| line(&mut row.iter().map(String::as_str))));
    lines.join("\n")
}

/// Bytes in the largest binary unit that leaves at least 1.
pub fn bytes(n: u64) -> String {
    let mut value = n as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{n} B") } else { format!("{value:.2} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.2} TiB")
}

/// A share as a percentage.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows =
            [vec!["plan".to_string(), "1".to_string()], vec!["a".to_string(), "1234".to_string()]];
        let text = table(&["name", "n"], &rows);
        assert_eq!(text, "name     n\n----  ----\nplan     1\na     1234");
    }

    #[test]
    fn cells_of_any_length_are_laid_out() {
        let long = "x".repeat(70_000);
        let rows = [vec![long.clone(), long.clone()], vec!["a".to_string(), "b".to_string()]];
        let text = table(&["name", "n"], &rows);
        assert!(
            text.contains(&format!("{long}  {long}")) && text.len() < 150_000,
            "{}",
            text.len()
        );
    }

    #[test]
    fn units_are_binary() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.50 KiB");
        assert_eq!(bytes(3 << 30), "3.00 GiB");
        assert_eq!(bytes(1 << 50), "1024.00 TiB");
    }
}
