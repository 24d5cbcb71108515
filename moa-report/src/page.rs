use std::fmt::Write;

use crate::figure::{Figure, Tone, escape, hex};

/// A table of a page; the first column is text, the others are numbers.
#[derive(Clone, Debug)]
pub struct Table {
    /// Heading above the table.
    pub title: String,
    /// Names of the columns.
    pub head: Vec<String>,
    /// Cells, row by row.
    pub rows: Vec<Vec<String>>,
}

/// An HTML page that holds everything it shows: styles and pictures inline, nothing fetched, no script.
#[derive(Clone, Debug)]
pub struct Page {
    /// Title and heading.
    pub title: String,
    /// Name and value of what the report is about.
    pub facts: Vec<(String, String)>,
    /// Tables, above the figures.
    pub tables: Vec<Table>,
    /// Figures, each a section.
    pub figures: Vec<Figure>,
}

impl Page {
    /// The page as HTML.
    pub fn html(&self) -> String {
        let title = escape(&self.title);
        let mut html = format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <title>{title}</title>\n<style>\n{}</style>\n</head>\n<body>\n<main>\n\
             <header>\n<h1>{title}</h1>\n\
             <label class=\"flip\"><input type=\"checkbox\" id=\"flip\"> switch light and dark</label>\n</header>\n",
            style()
        );
        if !self.facts.is_empty() {
            html.push_str("<dl>\n");
            for (name, value) in &self.facts {
                let _ = writeln!(html, "<dt>{}</dt><dd>{}</dd>", escape(name), escape(value));
            }
            html.push_str("</dl>\n");
        }
        self.tables.iter().for_each(|table| html.push_str(&table.html()));
        self.figures.iter().for_each(|figure| html.push_str(&figure.html()));
        let _ = write!(
            html,
            "<footer>Written by <code>moa report</code> {}.</footer>\n</main>\n</body>\n</html>\n",
            env!("CARGO_PKG_VERSION")
        );
        html
    }
}

impl Table {
    fn html(&self) -> String {
        let row = |tag: &str, cells: &[String]| {
            let cells: String =
                cells.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect();
            format!("<tr>{cells}</tr>\n")
        };
        let rows: String = self.rows.iter().map(|cells| row("td", cells)).collect();
        format!(
            "<section>\n<h2>{}</h2>\n<div class=\"scroll\"><table>\n<thead>{}</thead>\n<tbody>\n{rows}</tbody>\n\
             </table></div>\n</section>\n",
            escape(&self.title),
            row("th", &self.head),
        )
    }
}

/// The colours of a theme as CSS variables.
fn theme(colour: fn(Tone) -> [u8; 3], scheme: &str) -> String {
    let variables: String =
        Tone::ALL.iter().map(|tone| format!("--{}:{};", tone.name(), hex(colour(*tone)))).collect();
    format!("color-scheme:{scheme};{variables}")
}

/// The theme follows the reader's system, and the checkbox turns it into the other one.
fn style() -> String {
    let (light, dark) = (theme(Tone::light, "light"), theme(Tone::dark, "dark"));
    let mut css = format!(
        ":root{{{light}}}\n\
         :root:has(#flip:checked){{{dark}}}\n\
         @media (prefers-color-scheme:dark){{:root{{{dark}}}:root:has(#flip:checked){{{light}}}}}\n"
    );
    for tone in Tone::ALL {
        let name = tone.name();
        let _ = writeln!(css, ".f-{name}{{fill:var(--{name})}}.s-{name}{{stroke:var(--{name})}}");
    }
    css.push_str(LAYOUT);
    css
}

const LAYOUT: &str = "\
.cell{fill:color-mix(in srgb,var(--high) var(--v),var(--low))}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:1rem}
header{display:flex;flex-wrap:wrap;gap:.5rem 1.5rem;justify-content:space-between;align-items:center}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:0 0 .25rem}
section{border-top:1px solid var(--line);margin-top:1.5rem;padding-top:1rem}
section p{margin:0 0 1rem;max-width:46rem;color:var(--soft)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:.5rem 0}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
.flip{color:var(--soft);font-size:.9rem;cursor:pointer;padding:.25rem 0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .75rem .25rem 0;text-align:right;white-space:nowrap}
th{color:var(--soft);font-weight:600;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}
.panels{display:flex;flex-wrap:wrap;gap:1.25rem 2rem;align-items:flex-start}
.panels+.panels{margin-top:1.25rem}
@media (max-width:600px){dl{grid-template-columns:1fr}dd{margin-bottom:.4rem}.panels{gap:1.25rem 1rem}}
.legend{margin-top:.75rem}
svg{display:block;max-width:100%;height:auto}
footer{border-top:1px solid var(--line);margin-top:2rem;padding:1rem 0;color:var(--soft);font-size:.9rem}
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_fetches_nothing_and_escapes_text() {
        let table = Table {
            title: "a & b".to_string(),
            head: vec!["<th>".to_string()],
            rows: vec![vec!["\"".to_string()]],
        };
        let page = Page {
            title: "</title><script>alert(1)</script>".to_string(),
            facts: vec![("<dt>".to_string(), "<img src=x>".to_string())],
            tables: vec![table],
            figures: Vec::new(),
        };
        let html = page.html();
        for outside in ["http", "url(", "@import", "<script", "<img", "<link", "src="] {
            let found = html.matches(outside).count();
            // The value of the fact above, escaped.
            assert_eq!(found, usize::from(outside == "src="), "{outside}");
        }
        assert!(html.contains("<td>&quot;</td>") && html.contains("&lt;th&gt;"), "{html}");
    }

    #[test]
    fn both_themes_give_every_tone() {
        let css = style();
        for tone in Tone::ALL {
            let variable = format!("--{}:", tone.name());
            assert_eq!(css.matches(&variable).count(), 4, "{variable}");
        }
    }
}
