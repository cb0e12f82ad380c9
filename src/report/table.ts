// Plain tables for a terminal.

/** Rows under headings; columns of numbers are set to the right. */
export function table(headings: readonly string[], rows: readonly (readonly string[])[]): string {
  const columns = headings.map((heading, i) => {
    const cells = rows.map((row) => row[i] ?? '');
    const width = Math.max(heading.length, ...cells.map((cell) => cell.length));
    const right = cells.every((cell) => /^([-\d. ]+%?|\([\w/]*\))?$/.test(cell));
    return { right, width };
  });
  const line = (row: readonly string[]) =>
    columns
      .map(({ right, width }, i) => (right ? (row[i] ?? '').padStart(width) : (row[i] ?? '').padEnd(width)))
      .join('  ')
      .trimEnd();
  return `${[headings, ...rows].map(line).join('\n')}\n`;
}

/** 1234567 as "1 234 567". */
export function grouped(count: number): string {
  return String(count).replace(/\B(?=(\d{3})+$)/g, ' ');
}

/** "1 prompt", "8 prompts" */
export function counted(count: number, noun: string): string {
  return `${grouped(count)} ${noun}${count === 1 ? '' : 's'}`;
}

/** Three or four figures that matter: "0.123", "12.3", "1234". */
export function short(value: number): string {
  if (!Number.isFinite(value)) return '-';
  if (value === 0) return '0';
  const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.max(Math.abs(value), 1e-3))));
  return value.toFixed(Math.min(digits, 4));
}

/** 0.1234 as "12 %". */
export function percent(part: number): string {
  return Number.isFinite(part) ? `${(part * 100).toFixed(part < 0.1 ? 1 : 0)} %` : '-';
}
