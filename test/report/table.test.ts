import { describe, expect, it } from 'vitest';
import { counted, grouped, percent, short, table } from '../../src/report/table.js';

describe('table', () => {
  it('sets columns of numbers to the right and words to the left', () => {
    expect(
      table(
        ['axis', 'rows', 'result'],
        [
          ['tp', '1 024', 'equal'],
          ['repeat', '7', 'differs'],
        ],
      ),
    ).toBe('axis     rows  result\n' + 'tp      1 024  equal\n' + 'repeat      7  differs\n');
  });

  it('leaves no blanks at the end of a line', () => {
    expect(table(['a', 'b'], [['word', '']])).toBe('a     b\nword\n');
  });
});

describe('numbers for people', () => {
  it('show three figures', () => {
    expect([0, 0.1234, 1.2345, 12.345, 123.45, 12345].map(short)).toEqual([
      '0',
      '0.123',
      '1.23',
      '12.3',
      '123',
      '12345',
    ]);
    expect([0.00042, Number.NaN, Infinity].map(short)).toEqual(['0.0004', '-', '-']);
  });

  it('group thousands and count nouns', () => {
    expect([7, 1234, 1234567].map(grouped)).toEqual(['7', '1 234', '1 234 567']);
    expect([counted(1, 'prompt'), counted(2, 'prompt')]).toEqual(['1 prompt', '2 prompts']);
  });

  it('say parts as percent', () => {
    expect([0.011, 0.5, 1, Number.NaN].map(percent)).toEqual(['1.1 %', '50 %', '100 %', '-']);
  });
});
