/*
 * Added to the laboratory's user-mode kernel, behind <asm/pgalloc.h>.
 *
 * That kernel notes in a cleared entry of a page table that the process on the
 * host still has to unmap what was there (_PAGE_NEEDSYNC).  A new table in the
 * place of a cleared entry overwrites the note.  The process keeps the pages
 * of before: an mremap() over a mapping, or an munmap() beside another
 * thread's mmap(), leaves it with memory that belongs to something else by
 * then, the page cache of a file for example.  Here the new table's own
 * entries take the note over.
 */
#ifndef LABORATORY_TABLES_H
#define LABORATORY_TABLES_H

/* Has all entries of a new table unmapped by the next synchronisation. */
static inline void unmap_behind(void *table)
{
	unsigned long *entry = table;
	unsigned int i;

	for (i = 0; i < PTRS_PER_PTE; i++)
		entry[i] |= _PAGE_NEEDSYNC;
}

#undef pmd_populate
#define pmd_populate(mm, pmd, pte) do {					\
	if (pmd_needsync(*(pmd)))					\
		unmap_behind(page_to_virt(pte));			\
	set_pmd(pmd, __pmd(_PAGE_TABLE + page_to_phys(pte)));		\
} while (0)

#undef pud_populate
#define pud_populate(mm, pud, pmd) do {					\
	if (pud_needsync(*(pud)))					\
		unmap_behind(pmd);					\
	set_pud(pud, __pud(_PAGE_TABLE + __pa(pmd)));			\
} while (0)

#endif
