// Slurm's short forms: `n[001-003,007],gpu-[1-2]-[a,b]` for hosts, `2(x3),1` for tasks per node.

import { fail } from '../errors.js';

/** More hosts than this are a mistake or an attack on memory. */
const MOST_HOSTS = 65_536;
/** Numbers beyond are not exact. */
const MOST_DIGITS = 15;

type Refuse = (why: string) => Error;

/** The hosts of a list, in order; zero padding stays. TP_LAUNCHER when it is malformed. */
export function expandHostlist(list: string): string[] {
  const refuse: Refuse = (why) =>
    fail('TP_LAUNCHER', 'Slurm', `host list ${JSON.stringify(cut(list))}: ${why}`);
  const hosts: string[] = [];
  for (const item of splitOutside(list)) {
    if (!item) throw refuse('an empty name');
    if (/[[\]]/.test(item.replace(/\[[^[\]]*\]/g, ''))) throw refuse('a bracket without its partner');
    let names = [''];
    for (const [, text, ranges] of item.matchAll(/([^[\]]+)|\[([^[\]]*)\]/g)) {
      const tails = text !== undefined ? [text] : expandRanges(ranges!, refuse);
      if (hosts.length + names.length * tails.length > MOST_HOSTS) throw refuse(tooMany);
      names = names.flatMap((name) => tails.map((tail) => name + tail));
    }
    for (const name of names) hosts.push(name);
  }
  return hosts;
}

const tooMany = `more than ${MOST_HOSTS} hosts`;

/** `001-003,007` -> 001, 002, 003, 007 */
function expandRanges(ranges: string, refuse: Refuse): string[] {
  const expanded: string[] = [];
  for (const range of ranges.split(',')) {
    const match = /^(\d+)-(\d+)$/.exec(range);
    if (match && Math.max(match[1]!.length, match[2]!.length) > MOST_DIGITS)
      throw refuse(`range ${cut(range)} has more than ${MOST_DIGITS} digits`);
    if (!match && !/^[\w.]+$/.test(range)) throw refuse(`range ${JSON.stringify(cut(range))}`);
    const [from, to] = match ? [Number(match[1]), Number(match[2])] : [0, 0];
    if (to < from) throw refuse(`range ${range} runs backwards`);
    if (expanded.length + to - from >= MOST_HOSTS) throw refuse(tooMany);
    if (!match) expanded.push(range);
    else for (let n = from; n <= to; n++) expanded.push(String(n).padStart(match[1]!.length, '0'));
  }
  return expanded;
}

/** Splits at commas that stand outside brackets. */
function splitOutside(list: string): string[] {
  const items: string[] = [];
  let begin = 0;
  let inside = false;
  for (let at = 0; at < list.length; at++) {
    if (list[at] === '[') inside = true;
    else if (list[at] === ']') inside = false;
    else if (list[at] === ',' && !inside) {
      items.push(list.slice(begin, at));
      begin = at + 1;
    }
  }
  return [...items, list.slice(begin)];
}

/** Tasks of each node: `2(x3),1` -> 2, 2, 2, 1. TP_LAUNCHER. */
export function expandTasks(tasks: string): number[] {
  const expanded: number[] = [];
  for (const item of tasks.split(',')) {
    const match = /^(\d{1,6})(?:\(x(\d{1,6})\))?$/.exec(item);
    const nodes = Number(match?.[2] ?? 1);
    if (!match || expanded.length + nodes > MOST_HOSTS)
      throw fail('TP_LAUNCHER', 'Slurm', `tasks per node ${JSON.stringify(cut(tasks))} cannot be read`);
    for (let i = 0; i < nodes; i++) expanded.push(Number(match[1]));
  }
  return expanded;
}

/** As much of it as a message needs. */
function cut(text: string): string {
  return text.length > 200 ? `${text.slice(0, 200)}...` : text;
}
